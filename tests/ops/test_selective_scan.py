"""The selective scan: chunks are the loop, for every length and chunk size, forward and in every gradient."""

import pytest
import torch
from torch.nn import functional as F

from nestling.ops import groups
from nestling.ops.selective_scan.chunk import selective_scan as chunk
from nestling.ops.selective_scan.reference import selective_scan as reference
from nestling.testing import assert_close, chunk_equals_loop, gradcheck64

B, E, N = 2, 5, 3
FORMS = pytest.mark.parametrize("form", [reference, chunk], ids=["reference", "chunk"])


def inputs(T, batch=B):
    made = {
        "x": torch.randn(batch, T, E),
        "step": F.softplus(torch.randn(batch, T, E)),
        "rate": torch.rand(E, N) * 3,
        "write": torch.randn(batch, T, N),
        "read": torch.randn(batch, T, N),
        "initial_state": torch.randn(batch, E, N),
    }
    return {name: x.double() for name, x in made.items()}


@pytest.mark.parametrize(("T", "chunk_size"), [(1, 16), (63, 1), (63, 16), (100, 64), (1000, 64)])
def test_chunk_equals_reference_with_every_gradient(T, chunk_size):
    chunk_equals_loop(lambda **made: chunk(**made, chunk_size=chunk_size), reference, inputs(T))


def test_groups_of_chunks_that_are_run_again_have_the_same_gradients(monkeypatch):
    monkeypatch.setattr(groups, "KEPT_BYTES", 1)
    chunk_equals_loop(lambda **made: chunk(**made, chunk_size=8), reference, inputs(50))


@FORMS
def test_gradients_by_finite_differences(form):
    made = inputs(3, batch=1)
    gradcheck64(lambda *xs: form(**dict(zip(made, xs, strict=True))), *made.values())


@FORMS
@pytest.mark.parametrize("cut", [1, 37])
def test_any_split_equals_the_whole(form, cut):
    made = inputs(60)
    y, end = form(**made)
    parts = [slice(0, cut), slice(cut, None)]
    state, outputs = made["initial_state"], []
    for part in parts:
        here = {n: z[:, part] if n not in ("rate", "initial_state") else z for n, z in made.items()}
        o, state = form(**here | {"initial_state": state})
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), y, "y")
    assert_close(state, end, "state")


@FORMS
def test_causality_rows_and_steps_of_zero(form):
    made = inputs(40)
    y, end = form(**made)
    changed = {n: z.clone() for n, z in made.items()}
    for n in ("x", "step", "write", "read"):
        changed[n][0, 17:] = changed[n][0, 17:].flip(0)
    after, other = form(**changed)
    assert_close(after[0, :17], y[0, :17], "earlier tokens")
    assert_close(after[1], y[1], "the other row")
    assert not torch.equal(other[0], end[0])
    still = made | {"step": torch.zeros_like(made["step"])}
    assert_close(form(**still)[1], made["initial_state"], "nothing decays and nothing is written")


@FORMS
def test_without_decay_it_is_linear_attention_with_one_head(form):
    """(B, T, N) writes are keys, steps x are values: the Hebbian rule (64)."""
    made = inputs(30) | {"rate": torch.zeros(E, N, dtype=torch.float64)}
    values = made["step"] * made["x"]
    weights = (made["read"] @ made["write"].mT).tril()
    expected = weights @ values + torch.einsum(
        "bten,btn->bte", made["initial_state"][:, None].expand(-1, 30, -1, -1), made["read"]
    )
    assert_close(form(**made)[0], expected, "y")


@FORMS
def test_states_are_float32_for_bfloat16_inputs_and_no_tokens_change_nothing(form):
    made = {n: z.bfloat16() for n, z in inputs(40).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = form(**made)
    expected_y, expected = reference(**{n: z.float() for n, z in made.items()})
    assert y.dtype == torch.bfloat16
    assert_close(state, expected, "state", 1e-5)
    assert_close(y, expected_y.bfloat16(), "y", 1e-2)
    empty = inputs(0)
    y, state = form(**empty)
    assert y.shape == (B, 0, E)
    assert_close(state, empty["initial_state"], "state")


def test_strong_decay_over_a_long_chunk_stays_finite_in_float32():
    made = {n: z.float().requires_grad_() for n, z in (inputs(64) | {"rate": torch.full((E, N), 40.0)}).items()}
    y, state = chunk(**made)
    (y.sum() + state.sum()).backward()
    assert all(bool(z.grad.isfinite().all()) for z in made.values())
    assert_close(y, reference(**made)[0], "y", 1e-5)


def test_impossible_chunk_size_is_named():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        chunk(**inputs(4), chunk_size=0)
