"""Linear attention, delta rule, gated delta rule: the chunk form is the loop, for every length and chunk size."""

import pytest
import torch
from torch.nn import functional as F

from nestling.ops import delta_rule, gated_delta_rule, groups, linear_attention
from nestling.testing import assert_close, chunk_equals_loop, gradcheck64, random_loss

B, H, K, V = 2, 2, 4, 3
OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule, "gated_delta_rule": gated_delta_rule}
ORDER = {
    "linear_attention": ("q", "k", "v", "log_decay"),
    "delta_rule": ("q", "k", "v", "beta"),
    "gated_delta_rule": ("q", "k", "v", "beta", "g"),
}


def forms(name):
    return getattr(OPS[name].reference, name), getattr(OPS[name].chunk, name)


def inputs(name, T, batch=B, dtype=torch.float64):
    made = {
        "q": torch.randn(batch, T, H, K),
        "k": F.normalize(torch.randn(batch, T, H, K), dim=-1),
        "v": torch.randn(batch, T, H, V),
        "beta": 2 * torch.rand(batch, T, H),
        "g": F.logsigmoid(torch.randn(batch, T, H) + 2),
    }
    made["log_decay"] = made["g"]
    chosen = {arg: made[arg] for arg in ORDER[name]} | {"initial_state": torch.randn(batch, H, K, V)}
    return {arg: x.to(dtype) for arg, x in chosen.items()}


def part(made, tokens, state):
    return {arg: x[:, tokens] for arg, x in made.items() if arg != "initial_state"} | {"initial_state": state}


LENGTHS = [(T, chunk_size) for T in (1, 63, 100, 1000) for chunk_size in (1, 16, 64)] + [(100, 48), (4096, 64)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("T", "chunk_size"), LENGTHS)
def test_chunk_equals_reference_with_every_gradient(name, T, chunk_size):
    reference, chunk = forms(name)

    def sized(**made):
        return chunk(**made, chunk_size=chunk_size)

    chunk_equals_loop(sized, reference, inputs(name, T))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kept", [1, 3000])
def test_groups_of_chunks_that_are_run_again_have_the_same_gradients(name, kept, monkeypatch):
    monkeypatch.setattr(groups, "KEPT_BYTES", kept)
    reference, chunk = forms(name)
    chunk_equals_loop(lambda **made: chunk(**made, chunk_size=8), reference, inputs(name, 50))


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_those_of_the_loop(name):
    def first(form, **options):
        def call(**made):
            outputs = [y.square() for y in form(**made, **options)]
            return torch.autograd.grad(random_loss(outputs), list(made.values()), create_graph=True)

        return call

    reference, chunk = forms(name)
    chunk_equals_loop(first(chunk, chunk_size=4), first(reference), inputs(name, 10), rtol=1e-9)


def gradients(name):
    made = {n: x.requires_grad_() for n, x in inputs(name, 100, dtype=torch.float32).items()}
    outputs = forms(name)[1](**made, chunk_size=16)
    return (*outputs, *torch.autograd.grad(random_loss(outputs), list(made.values())))


@pytest.mark.parametrize("name", OPS)
def test_two_threads_give_the_numbers_of_one(name):
    results = []
    try:
        for threads in (1, 2):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            results.append(gradients(name))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*results, strict=True):
        assert_close(a, b, "two threads", rtol=1e-6)


def test_linear_attention_without_decay():
    made = inputs("linear_attention", 100)
    del made["log_decay"]
    chunk_equals_loop(linear_attention.chunk.linear_attention, linear_attention.reference.linear_attention, made)


@pytest.mark.parametrize("name", OPS)
def test_reference_gradients_by_finite_differences(name):
    made = inputs(name, 3, batch=1)
    reference, _ = forms(name)
    gradcheck64(lambda *xs: reference(**dict(zip(made, xs, strict=True))), *made.values())


@pytest.mark.parametrize("name", OPS)
def test_no_initial_state_is_a_zero_state(name):
    made = inputs(name, 20)
    zero = made | {"initial_state": torch.zeros_like(made["initial_state"])}
    none = made | {"initial_state": None}
    for form in forms(name):
        for a, b in zip(form(**none), form(**zero), strict=True):
            assert_close(a, b, name)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("cut", [1, 16, 37, 99])
def test_any_split_equals_the_whole(name, cut):
    made = inputs(name, 100)
    for form in forms(name):
        o, end = form(**made)
        first, state = form(**part(made, slice(0, cut), made["initial_state"]))
        second, state = form(**part(made, slice(cut, None), state))
        assert_close(torch.cat([first, second], 1), o, f"{name} output")
        assert_close(state, end, f"{name} state")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("t", [5, 31, 32])
def test_causality(name, t):
    made = inputs(name, 50)
    for form in forms(name):
        before, _ = form(**made)
        changed = {arg: x.clone() for arg, x in made.items()}
        for arg in ORDER[name]:
            changed[arg][:, t:] = changed[arg][:, t:].flip(1)
        after, _ = form(**changed)
        assert_close(after[:, :t], before[:, :t], name)
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("name", OPS)
def test_rows_do_not_interact(name):
    made = inputs(name, 40)
    for form in forms(name):
        both = form(**made)
        alone = form(**{arg: x[1:] for arg, x in made.items()})
        for a, b in zip(both, alone, strict=True):
            assert_close(a[1:], b, name)


@pytest.mark.parametrize("name", OPS)
def test_no_tokens_change_nothing(name):
    made = inputs(name, 0)
    for form in forms(name):
        o, state = form(**made)
        assert o.shape == (B, 0, H, V)
        assert_close(state, made["initial_state"], name)


@pytest.mark.parametrize("name", OPS)
def test_float32_chunk_is_close_to_the_float64_loop(name):
    reference, chunk = forms(name)
    made = inputs(name, 300)
    for a, b in zip(chunk(**{n: x.float() for n, x in made.items()}), reference(**made), strict=True):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, name, rtol=2e-5)


@pytest.mark.parametrize("name", OPS)
def test_state_and_arithmetic_are_float32_for_bfloat16_inputs_and_under_autocast(name):
    made = {n: x.bfloat16() for n, x in inputs(name, 40).items()}
    for form in forms(name):
        expected_o, expected = form(**{n: x.float() for n, x in made.items()})
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                o, state = form(**made)
            assert o.dtype == torch.bfloat16
            assert_close(state, expected, f"{name} state", rtol=1e-6)
            assert_close(o, expected_o.bfloat16(), f"{name} output", rtol=1e-6)


def test_strong_decay_over_a_long_chunk_stays_finite_in_float32():
    """exp(-20) per token for 64 tokens: 1/gamma would overflow, differences do not."""
    made = inputs("gated_delta_rule", 64, dtype=torch.float32)
    made["g"] = torch.full_like(made["g"], -20.0)
    made = {n: x.requires_grad_() for n, x in made.items()}
    o, state = gated_delta_rule.chunk.gated_delta_rule(**made)
    (o.sum() + state.sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in made.values())
    expected, _ = gated_delta_rule.reference.gated_delta_rule(**made)
    assert_close(o, expected, "output", rtol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_impossible_chunk_size_is_named(name):
    with pytest.raises(ValueError, match="chunk_size is 0"):
        forms(name)[1](**inputs(name, 4), chunk_size=0)
