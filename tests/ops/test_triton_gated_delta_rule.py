"""The kernel of the gated delta rule against its loop: on the GPU where there is one, else in triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

from nestling.ops import dispatch
from nestling.ops.gated_delta_rule.reference import gated_delta_rule as reference
from nestling.testing import assert_close, chunk_equals_loop
from tests.needs import triton_runs

triton_runs()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def kernel(**made):
    """In float32 and back, so that results and gradients are compared with the float64 loop."""
    low = {name: x if x is None else x.to(DEVICE, torch.float32) for name, x in made.items() if name != "chunk_size"}
    o, state = dispatch.gated_delta_rule(**low, chunk_size=made.get("chunk_size", 16), form="triton")
    return o.to("cpu", torch.float64), state.to("cpu", torch.float64)


def loop(chunk_size=None, **made):
    return reference(**made)


def inputs(T, K=16, V=16, B=1, H=2):
    return {
        "q": torch.randn(B, T, H, K, dtype=torch.float64),
        "k": F.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1),
        "v": torch.randn(B, T, H, V, dtype=torch.float64),
        "beta": 2 * torch.rand(B, T, H, dtype=torch.float64),
        "g": F.logsigmoid(torch.randn(B, T, H, dtype=torch.float64) + 2),
        "initial_state": torch.randn(B, H, K, V, dtype=torch.float64),
    }


@pytest.mark.parametrize(("T", "K", "V", "chunk_size"), [(1, 16, 16, 16), (63, 16, 64, 32), (100, 32, 16, 16)])
def test_kernel_equals_reference_with_every_gradient(T, K, V, chunk_size):
    chunk_equals_loop(kernel, loop, inputs(T, K, V, B=2), rtol=1e-5, chunk_size=chunk_size)


@pytest.mark.parametrize("T", [1000, 4096])
def test_many_chunks(T):
    chunk_equals_loop(kernel, loop, inputs(T, H=1), rtol=1e-5, chunk_size=64)


def test_equal_keys_that_are_replaced_completely():
    """Powers of A would grow to 1e8 here and cancel; the inverse has entries 0, 1 and -1."""
    made = inputs(32, H=1)
    made |= {"k": made["k"][:, :1].expand(-1, 32, -1, -1), "beta": torch.ones(1, 32, 1), "g": torch.zeros(1, 32, 1)}
    chunk_equals_loop(kernel, loop, {name: x.double() for name, x in made.items()}, rtol=1e-5, chunk_size=32)


def test_strong_decay_stays_finite():
    made = inputs(32, H=1) | {"g": torch.full((1, 32, 1), -20.0, dtype=torch.float64)}
    chunk_equals_loop(kernel, loop, made, rtol=1e-5, chunk_size=32)


def test_no_initial_state_and_no_tokens():
    made = inputs(20) | {"initial_state": None}
    for a, b in zip(kernel(**made), reference(**made), strict=True):
        assert_close(a, b, "fresh", rtol=1e-5)
    made = inputs(0)
    o, state = kernel(**made)
    assert o.shape == (1, 0, 2, 16)
    assert_close(state, made["initial_state"], "state", rtol=1e-6)


def test_the_delta_rule_is_the_gated_rule_that_keeps_everything():
    made = inputs(20)
    del made["g"]
    low = {name: x.to(DEVICE, torch.float32) for name, x in made.items()}
    for a, b in zip(dispatch.delta_rule(**low, form="triton"), dispatch.delta_rule(**made), strict=True):
        assert_close(a.to("cpu", torch.float64), b, "delta rule", rtol=1e-5)


def test_second_derivatives():
    def gradient(form):
        def call(**made):
            o, state = form(**made)
            return torch.autograd.grad(o.square().sum() + state.sum(), (made["k"], made["g"]), create_graph=True)

        return call

    chunk_equals_loop(gradient(kernel), gradient(loop), inputs(20, H=1), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 63, 100, 1000, 4096])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("form", ["triton", "fla"])
def test_bfloat16_on_the_gpu(T, width, form):
    if form == "fla":
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    made = {name: x.to("cuda", torch.float32) for name, x in inputs(T, width, width, B=2, H=4).items()}
    made |= {"q": F.normalize(made["q"], dim=-1), "beta": made["beta"] / 2}
    made |= {name: made[name].bfloat16() for name in ("q", "k", "v", "beta")}
    results = []
    for name, dtype in ((form, None), ("reference", torch.float32)):
        leaves = {n: x.to(dtype or x.dtype).requires_grad_() for n, x in made.items()}
        o, state = dispatch.gated_delta_rule(**leaves, form=name)
        torch.manual_seed(1)
        loss = (o * torch.randn_like(o, dtype=torch.bfloat16)).sum() + (state * torch.randn_like(state)).sum()
        results.append(((o, state), torch.autograd.grad(loss, list(leaves.values()))))
    (ours, our_gradients), (theirs, their_gradients) = results
    for tolerance, a_list, b_list in ((5e-3, ours, theirs), (1e-2, our_gradients, their_gradients)):
        for a, b in zip(a_list, b_list, strict=True):
            error = float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt())
            assert error <= tolerance, f"{tuple(a.shape)}: relative RMS {error:.2e}, allowed {tolerance:g}"
