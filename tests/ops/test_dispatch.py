import pytest
import torch

from nestling import ops
from nestling.ops import dispatch
from nestling.testing import assert_close


def call(name, form, T):
    torch.manual_seed(0)
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, T, 2, 4, dtype=torch.float64), dim=-1)
    beta = torch.rand(2, T, 2, dtype=torch.float64)
    run = getattr(dispatch, name)
    if name == "titans":
        weights = (torch.randn(2, 4, 4, dtype=torch.float64),)
        y, state = run(q, k, v, beta, -beta, -beta, weights=weights, chunk_size=4, form=form)
        return y, *state
    if name == "selective_scan":
        return run(v[:, :, 0], beta.repeat(1, 1, 2), torch.ones(4, 4).double(), q[:, :, 0], k[:, :, 0], form=form)
    if name == "ttt":
        weights, norm = (torch.randn(2, 5, 4, dtype=torch.float64),), torch.randn(2, 2, 4, dtype=torch.float64).unbind()
        y, state = run(q, k, v, beta, weights=weights, norm=norm, chunk_size=4, form=form)
        return y, *state
    if name == "self_modifying":
        gates = torch.randn(2, 2, 4, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        weights = (torch.randn(2, 5, 4, 4, dtype=torch.float64),)
        rates = torch.ones(2, 5, dtype=torch.float64)
        y, state = run(k, q, weights, *gates, rates, rule=ops.self_modifying.Rule(), chunk_size=4, form=form)
        return y, *state
    if name == "cms_update":
        return run(k[:, :, 0], v[:, :, 0], beta[..., 0], period=3, form=form)
    gates = {"linear_attention": (-beta,), "delta_rule": (beta,), "gated_delta_rule": (beta, -beta)}[name]
    return run(q, k, v, *gates, initial_state=torch.randn(2, 2, 4, 4, dtype=torch.float64), chunk_size=4, form=form)


NAMES = [
    "self_modifying",
    "linear_attention",
    "delta_rule",
    "gated_delta_rule",
    "titans",
    "ttt",
    "selective_scan",
    "cms_update",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 10])
def test_every_form_gives_the_same_numbers(name, T):
    expected = call(name, "reference", T)
    for form in ("auto", "chunk"):
        for a, b in zip(call(name, form, T), expected, strict=True):
            assert_close(a, b, f"{name} {form}")


@pytest.mark.parametrize("name", NAMES)
def test_the_named_form_runs(name, monkeypatch):
    ran = []
    for form in ("reference", "chunk"):
        module = getattr(getattr(ops, name), form)
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=form, _o=original, **o: (ran.append(_f), _o(*a, **o))[1])
    for form in ("reference", "chunk", "auto"):
        call(name, form, 10)
    assert ran == ["reference", "chunk", "chunk"]


def test_one_token_of_an_exact_op_takes_the_loop():
    assert dispatch.choose("delta_rule", 1).form == "reference"
    assert dispatch.choose("delta_rule", 2).form == "chunk"
    assert dispatch.choose("titans", 1).form == "chunk"


@pytest.fixture
def with_a_kernel(monkeypatch):
    """An op with a kernel, where every package is installed and nothing is interpreted."""
    monkeypatch.setitem(dispatch.FORMS, "gated_delta_rule", ("reference", "chunk", "triton", "fla"))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


OBSTACLES = [
    ({"device": "cpu"}, "on cpu"),
    ({"dtype": torch.float64}, "float64"),
    ({"widths": (64, 48)}, "48"),
    ({"widths": (64, 256)}, "256"),
    ({"chunk_size": 128}, "plain batched products fill the card"),
]


def test_auto_takes_the_kernel_for_cuda_tensors(with_a_kernel):
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.choose("gated_delta_rule", 100, device="cuda", dtype=dtype).form == "triton"
    assert dispatch.choose("gated_delta_rule", 1, device="cuda").form == "reference"
    assert dispatch.choose("cms_update", 100, device="cuda") == ("chunk", "the op has no kernel")


@pytest.mark.parametrize(("call", "reason"), OBSTACLES)
def test_auto_says_why_it_does_not_take_the_kernel_and_a_named_kernel_fails(with_a_kernel, call, reason):
    call = {"device": "cuda"} | call
    chosen = dispatch.choose("gated_delta_rule", 100, **call)
    assert chosen.form == "chunk" and reason in chosen.reason
    with pytest.raises(ValueError, match=f"form is 'triton', but .*{reason}.*; use 'auto' or 'chunk'"):
        dispatch.choose("gated_delta_rule", 100, "triton", **call)


def test_a_kernel_whose_package_is_missing(with_a_kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    chosen = dispatch.choose("gated_delta_rule", 100, device="cuda")
    assert chosen == ("chunk", "the package triton is not installed")
    with pytest.raises(ValueError, match="the package fla is not installed"):
        dispatch.choose("gated_delta_rule", 100, "fla", "cuda", dtype=torch.bfloat16)


def test_the_interpreter_runs_a_named_kernel_on_the_cpu_and_auto_never_does(with_a_kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("gated_delta_rule", 100, "triton").form == "triton"
    assert dispatch.choose("gated_delta_rule", 100).form == "chunk"


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="form is 'fast'; delta_rule has auto, reference, chunk"):
        dispatch.choose("delta_rule", 4, "fast")
    with pytest.raises(ValueError, match="form is 'fla'; cms_update has auto, reference, chunk"):
        dispatch.choose("cms_update", 4, "fla")


@pytest.mark.parametrize("name", NAMES)
def test_each_form_is_a_module_with_a_function_named_like_the_op(name):
    for form in ("reference", "chunk"):
        assert callable(getattr(getattr(getattr(ops, name), form), name))
