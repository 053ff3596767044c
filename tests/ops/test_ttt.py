"""TTT: the dual form is the loop, for every length, chunk size and phase; its write is autograd's gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling.ops import groups
from nestling.ops.ttt.chunk import ttt as chunk
from nestling.ops.ttt.reference import ttt as reference
from nestling.testing import assert_close, chunk_equals_loop, gradcheck64

B, H, K, HIDDEN = 2, 2, 4, 6
FORMS = pytest.mark.parametrize("form", [reference, chunk], ids=["reference", "chunk"])
KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])
STATE = ("A0", "A1", "D0", "D1")


def inputs(T, kind="mlp", batch=B):
    shapes = {"linear": [(K + 1, K)], "mlp": [(K + 1, HIDDEN), (HIDDEN + 1, K)]}[kind]
    made = {name: torch.randn(batch, T, H, K) for name in "qkv"} | {"eta": 0.2 * torch.rand(batch, T, H)}
    made |= {"scale": 1 + 0.3 * torch.randn(H, K), "shift": 0.3 * torch.randn(H, K)}
    made |= {f"W{i}": 0.5 * torch.randn(H, *shape) for i, shape in enumerate(shapes)}
    for part in "AD":
        made |= {f"{part}{i}": 0.1 * torch.randn(batch, H, *shape) for i, shape in enumerate(shapes)}
    return {name: x.double() for name, x in made.items()}


def named(form):
    """The op with its tuples spelled out. At a chunk border (count 0) the anchor is the running memory."""

    def call(**made):
        weights = tuple(made.pop(n) for n in ("W0", "W1") if n in made)
        norm = made.pop("scale"), made.pop("shift")
        given = {n: made.pop(n) for n in STATE if n in made}
        for n in [n for n in given if n[0] == "A"]:
            fresh = (made["count"] if made.get("count") is not None else torch.zeros(len(given[n]))) == 0
            given[n] = torch.where(fresh.view(-1, 1, 1, 1), given["D" + n[1]], given[n])
        y, state = form(**made, weights=weights, norm=norm, state=tuple(given.values()) or None)
        return y, *state

    return call


@KINDS
@pytest.mark.parametrize(("T", "chunk_size"), [(1, 16), (19, 1), (63, 16), (50, 64)])
def test_chunk_equals_reference_with_every_gradient(T, chunk_size, kind):
    chunk_equals_loop(named(chunk), named(reference), inputs(T, kind), chunk_size=chunk_size, rtol=1e-9)


def test_chunk_equals_reference_over_a_thousand_tokens():
    made = {n: x for n, x in inputs(1000, "linear", batch=1).items() if n not in STATE}
    chunk_equals_loop(named(chunk), named(reference), made, chunk_size=16, rtol=1e-9)


OPEN = [  # tokens, tokens in each row's open chunk, lengths; chunks of 8
    (1, [3, 7, 0], [1, 0, 1]),
    (5, [3, 3, 3], None),
    (20, [0, 7, 3], None),
    (21, [2, 7, 3], [21, 9, 4]),
]


@KINDS
@pytest.mark.parametrize(("T", "count", "lengths"), OPEN)
def test_an_open_chunk_goes_on_with_every_gradient(T, count, lengths, kind):
    """Rows at any place of their chunk, of any length."""
    real = torch.arange(T) < (torch.full((3,), T) if lengths is None else torch.tensor(lengths))[:, None]
    options = {"chunk_size": 8, "count": torch.tensor(count)}
    options["lengths"] = None if lengths is None else torch.tensor(lengths)

    def seen(form):
        def call(**made):
            y, *state = named(form)(**made)
            return y * real[..., None, None], *state

        return call

    chunk_equals_loop(seen(chunk), seen(reference), inputs(T, kind, batch=3), rtol=1e-9, **options)


def test_groups_of_chunks_that_are_run_again_have_the_same_gradients(monkeypatch):
    monkeypatch.setattr(groups, "KEPT_BYTES", 1)
    chunk_equals_loop(named(chunk), named(reference), inputs(40), chunk_size=8, rtol=1e-9)


@KINDS
def test_gradients_by_finite_differences(kind):
    """A token is written, and read one chunk later."""
    made = {n: x for n, x in inputs(2, kind, batch=1).items() if n not in STATE}
    gradcheck64(lambda *xs: named(chunk)(**dict(zip(made, xs, strict=True)), chunk_size=1), *made.values())


@FORMS
@KINDS
def test_one_token_is_one_autograd_step_of_the_layer_written_with_torch(form, kind):
    """nn.Linear, nn.GELU, nn.LayerNorm and torch.optim.SGD, for each row and head."""
    made = inputs(1, kind)
    for name in [n for n in made if n in STATE]:
        del made[name]
    y, *state = named(form)(**made)
    for b in range(B):
        for h in range(H):
            maps = []
            for weight in (made[n][h] for n in ("W0", "W1") if n in made):
                maps.append(nn.Linear(len(weight) - 1, weight.shape[1]).double())
                maps[-1].weight.data, maps[-1].bias.data = weight[:-1].T.clone(), weight[-1].clone()
            body = nn.Sequential(maps[0]) if kind == "linear" else nn.Sequential(maps[0], nn.GELU("tanh"), maps[1])

            def f(z, body=body, h=h):
                return z + F.layer_norm(body(z), (K,), made["scale"][h], made["shift"][h], 1e-6)

            (0.5 * (f(made["k"][b, 0, h]) - made["v"][b, 0, h]).square().sum()).backward()
            torch.optim.SGD(body.parameters(), lr=float(made["eta"][b, 0, h])).step()
            assert_close(y[b, 0, h], f(made["q"][b, 0, h]).detach(), "y")
            moved = body[0].weight.T.detach() - made["W0"][h, :-1]
            assert_close(state[len(maps)][b, h, :-1], moved, "the first matrix after the write")


@FORMS
@KINDS
def test_causality_and_rows(form, kind):
    made = inputs(20, kind)
    y, *_ = named(form)(**made, chunk_size=8)
    changed = {n: x.clone() for n, x in made.items()}
    for n in ("q", "k", "v", "eta"):
        changed[n][0, 11:] = changed[n][0, 11:].flip(0)
    after, *_ = named(form)(**changed, chunk_size=8)
    assert_close(after[0, :11], y[0, :11], "earlier tokens")
    assert_close(after[1], y[1], "the other row")
    assert not torch.equal(after[0, 11:], y[0, 11:])


@KINDS
def test_float32_chunk_is_close_to_the_float64_loop_and_states_stay_float32(kind):
    made = inputs(100, kind)
    expected = named(reference)(**made, chunk_size=16)
    ours = named(chunk)(**{n: x.float() for n, x in made.items()}, chunk_size=16)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, "float32", 1e-4)
    half = {n: x.bfloat16() if n in "qkv" else x.float() for n, x in made.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *state = named(chunk)(**half, chunk_size=16)
    assert y.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in state)


def test_no_tokens_change_nothing():
    made = inputs(0)
    for form in (reference, chunk):
        y, *state = named(form)(**made)
        assert y.shape == (B, 0, H, K)
        for name, x in zip(("D0", "D1"), state[2:], strict=True):
            assert_close(x, made[name], name)


def test_what_cannot_work_is_named():
    made = inputs(2, "linear")
    for name, value, says in (
        ("chunk_size", 0, "chunk_size is 0"),
        ("W0", made["W0"][:, :-1], "a row more than inputs"),
        ("scale", made["scale"][:, :-1], "norm has shapes"),
    ):
        for form in (reference, chunk):
            with pytest.raises(ValueError, match=says):
                named(form)(**(made | {name: value}))
