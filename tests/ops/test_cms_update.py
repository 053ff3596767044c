from itertools import product

import pytest
import torch

from nestling.ops.cms_update.chunk import cms_update as chunk
from nestling.ops.cms_update.reference import cms_update as reference
from nestling.testing import assert_close, chunk_equals_loop, gradcheck64

B, I, O = 3, 4, 2
FORMS = pytest.mark.parametrize("form", [reference, chunk], ids=["reference", "chunk"])


def inputs(T, batch=B):
    made = {
        "x": torch.randn(batch, T, I),
        "error": torch.randn(batch, T, O),
        "rate": torch.rand(batch, T),
        "delta": torch.randn(batch, O, I),
        "buffer": torch.randn(batch, O, I),
    }
    return {name: x.double() for name, x in made.items()}


def floats(form):
    """The differentiable outputs."""
    return lambda **made: form(**made)[:2]


@pytest.mark.parametrize(("T", "period"), [*product((1, 63, 100, 1000), (1, 16, 64)), (4096, 64)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_chunk_equals_reference_with_every_gradient(T, period, reduction):
    options = {"period": period, "reduction": reduction, "count": torch.tensor([0, period // 2, period - 1])}
    options["lengths"] = torch.tensor([T, T // 2, 0])
    made = inputs(T)
    chunk_equals_loop(floats(chunk), floats(reference), made, **options)
    for a, b in zip(chunk(**made, **options)[2:], reference(**made, **options)[2:], strict=True):
        assert torch.equal(a, b)


def test_reference_gradients_by_finite_differences():
    made = inputs(5, batch=2)
    count = torch.tensor([0, 1])
    gradcheck64(lambda *xs: reference(**dict(zip(made, xs, strict=True)), period=2, count=count)[:2], *made.values())


@FORMS
@pytest.mark.parametrize("cuts", [[1], [7], [5, 16, 17], [32]])
def test_any_split_equals_the_whole(form, cuts):
    made = inputs(40)
    state = {"delta": made.pop("delta"), "buffer": made.pop("buffer"), "count": torch.tensor([0, 3, 7])}
    whole = form(**made, **state, period=8)
    writes = torch.zeros(B, dtype=torch.long)
    for start, stop in zip([0, *cuts], [*cuts, 40], strict=True):
        *parts, now = form(**{n: x[:, start:stop] for n, x in made.items()}, **state, period=8)
        state = dict(zip(state, parts, strict=True))
        writes = writes + now
    for name, a, b in zip(["delta", "buffer"], state.values(), whole, strict=False):
        assert_close(a, b, name)
    assert torch.equal(state["count"], whole[2])
    assert torch.equal(writes, whole[3])


@FORMS
def test_padding_is_neither_written_nor_counted(form):
    made = inputs(30)
    lengths = torch.tensor([30, 11, 0])
    padded = form(**made, period=4, lengths=lengths)
    for row, n in enumerate(lengths):
        alone = form(
            **{k: x[row : row + 1] if k in ("delta", "buffer") else x[row : row + 1, :n] for k, x in made.items()},
            period=4,
        )
        for name, a, b in zip(["delta", "buffer", "count", "writes"], padded, alone, strict=True):
            assert_close(a[row : row + 1], b, name)


@FORMS
def test_rows_do_not_interact(form):
    made = inputs(30)
    both = form(**made, period=4)
    alone = form(**{n: x[1:2] for n, x in made.items()}, period=4)
    for a, b in zip(both, alone, strict=True):
        assert_close(a[1:2], b, "row")


@FORMS
def test_one_rate_for_all_tokens(form):
    made = inputs(10)
    one = form(**(made | {"rate": torch.tensor(0.3)}), period=4)
    many = form(**(made | {"rate": torch.full((B, 10), 0.3)}), period=4)
    assert_close(one[0], many[0], "delta", rtol=1e-6)


@FORMS
def test_state_is_float32_for_bfloat16_inputs_and_under_autocast(form):
    made = {n: x.bfloat16() for n, x in inputs(20).items()}
    expected = form(**{n: x.float() for n, x in made.items()}, period=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = form(**made, period=8)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert_close(a, b, "state", rtol=1e-6)


@FORMS
@pytest.mark.parametrize("options", [{"period": 0}, {"period": 4, "reduction": "max"}])
def test_impossible_options_are_named(form, options):
    with pytest.raises(ValueError, match="period="):
        form(**inputs(4), **options)
