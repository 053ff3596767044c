import pytest
import torch
from torch.nn import functional as F

from nestling.ops import groups
from nestling.ops.titans.chunk import titans as chunk
from nestling.ops.titans.reference import titans as reference
from nestling.testing import assert_close, chunk_equals_loop, gradcheck64, random_loss

B, H, K, HIDDEN = 2, 2, 4, 6
STATE = ("A0", "A1", "D0", "D1", "S0", "S1")
FORMS = pytest.mark.parametrize("form", [reference, chunk], ids=["reference", "chunk"])
KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])
MOMENTUM = pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])


def inputs(T, kind="mlp", momentum=True, batch=B, dtype=torch.float64, H=H):
    """Named tensors; weights, anchor, running and surprise spelled out as W0, W1, A0, A1, D0, D1, S0, S1 so that each
    has its own gradient."""
    shapes = [(K, K)] if kind == "linear" else [(K, HIDDEN), (HIDDEN, K)]
    made = {
        "q": F.normalize(torch.randn(batch, T, H, K), dim=-1),
        "k": F.normalize(torch.randn(batch, T, H, K), dim=-1),
        "v": torch.randn(batch, T, H, K),
        "eta": 0.2 * torch.rand(batch, T, H),
        "log_decay": F.logsigmoid(torch.randn(batch, T, H) + 3),
    }
    if momentum:
        made["log_momentum"] = F.logsigmoid(torch.randn(batch, T, H))
    made |= {f"W{i}": 0.5 * torch.randn(H, *shape) for i, shape in enumerate(shapes)}
    made |= {f"A{i}": 0.1 * torch.randn(batch, H, *shape) for i, shape in enumerate(shapes)}
    made |= {f"D{i}": 0.1 * torch.randn(batch, H, *shape) for i, shape in enumerate(shapes)}
    if momentum:
        made |= {f"S{i}": 0.1 * torch.randn(batch, H, *shape) for i, shape in enumerate(shapes)}
    return {name: x.to(dtype) for name, x in made.items()}


def named(form):
    """The op with its tuples spelled out. At a chunk border (count 0) the anchor is the running memory."""

    def call(**made):
        weights = tuple(made.pop(n) for n in ("W0", "W1") if n in made)
        given = {n: made.pop(n) for n in STATE if n in made}
        for n in [n for n in given if n[0] == "A"]:
            fresh = (made["count"] if made.get("count") is not None else torch.zeros(len(given[n]))) == 0
            given[n] = torch.where(fresh.view(-1, 1, 1, 1), given["D" + n[1]], given[n])
        y, state = form(**made, weights=weights, state=tuple(given.values()) or None)
        return y, *state

    return call


def cut(made, tokens):
    return {n: x[:, tokens] if n[0].islower() else x for n, x in made.items()}


def carried(made, state):
    """`made` with the state that an earlier call returned."""
    return made | dict(zip([n for n in STATE if n in made], state, strict=True))


@KINDS
@MOMENTUM
@pytest.mark.parametrize("decay_to", ["zero", "initial"])
def test_normalized_writes_with_every_gradient(decay_to, momentum, kind):
    made = inputs(70, kind, momentum)
    made["k"] = 3 * made["k"]  # curvatures on both sides of 2
    options = {"chunk_size": 8, "decay_to": decay_to, "normalized": True, "lengths": torch.tensor([70, 41])}
    made["eta"] = made["eta"] / 8
    chunk_equals_loop(
        lambda **m: named(chunk)(**m)[1:], lambda **m: named(reference)(**m)[1:], made, rtol=1e-9, **options
    )


@KINDS
@MOMENTUM
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("T", [1, 63, 100])
def test_chunk_equals_reference_with_every_gradient(T, chunk_size, momentum, kind):
    chunk_equals_loop(named(chunk), named(reference), inputs(T, kind, momentum), chunk_size=chunk_size)


@KINDS
@pytest.mark.parametrize(("T", "chunk_size"), [(1000, 1), (1000, 16), (4096, 64)])
def test_chunk_equals_reference_over_thousands_of_tokens(T, chunk_size, kind):
    made = inputs(T, kind, batch=1, H=1)
    made["eta"] = made["eta"] / chunk_size  # a chunk sums its gradients
    chunk_equals_loop(named(chunk), named(reference), made, chunk_size=chunk_size)


OPEN = [  # tokens, tokens in each row's open chunk, lengths; chunks of 8
    (1, [3, 7, 0], None),
    (1, [3, 7, 0], [1, 0, 1]),
    (5, [3, 3, 3], None),
    (4, [3, 7, 0], [4, 0, 2]),
    (30, [5, 5, 5], None),
    (30, [0, 7, 3], None),
    (30, [0, 0, 0], [30, 13, 0]),
    (37, [2, 7, 3], [37, 9, 4]),
]


@MOMENTUM
@pytest.mark.parametrize("decay_to", ["zero", "initial"])
@pytest.mark.parametrize(("T", "count", "lengths"), OPEN)
def test_an_open_chunk_goes_on_with_every_gradient(T, count, lengths, decay_to, momentum):
    """Rows at any place of their chunk, of any length."""
    real = torch.arange(T) < (torch.full((3,), T) if lengths is None else torch.tensor(lengths))[:, None]
    options = {"chunk_size": 8, "decay_to": decay_to, "count": torch.tensor(count)}
    options["lengths"] = None if lengths is None else torch.tensor(lengths)

    def seen(form):
        def call(**made):
            y, *state = named(form)(**made)
            return y * real[..., None, None], *state

        return call

    chunk_equals_loop(seen(chunk), seen(reference), inputs(T, momentum=momentum, batch=3), **options)


@pytest.mark.parametrize("kept", [1, 3000])
def test_groups_of_chunks_that_are_run_again_have_the_same_gradients(kept, monkeypatch):
    monkeypatch.setattr(groups, "KEPT_BYTES", kept)
    lengths = torch.tensor([70, 40])
    chunk_equals_loop(named(chunk), named(reference), inputs(66), chunk_size=8)
    chunk_equals_loop(
        lambda **m: named(chunk)(**m)[1:],
        lambda **m: named(reference)(**m)[1:],
        inputs(70),
        chunk_size=8,
        lengths=lengths,
    )


@KINDS
@pytest.mark.parametrize("kept", [1, groups.KEPT_BYTES], ids=["again", "kept"])
def test_second_derivatives_are_those_of_the_loop(kept, kind, monkeypatch):
    monkeypatch.setattr(groups, "KEPT_BYTES", kept)

    def first(form):
        def call(**made):
            outputs = [y.square() for y in named(form)(**made, chunk_size=3, count=torch.tensor([1, 1]))]
            found = torch.autograd.grad(random_loss(outputs), list(made.values()), create_graph=True)
            return tuple(found)

        return call

    chunk_equals_loop(first(chunk), first(reference), inputs(10, kind), rtol=1e-9)


@KINDS
def test_two_threads_give_the_numbers_of_one(kind):
    made, results = inputs(100, kind, dtype=torch.float32), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = {n: x.clone().requires_grad_() for n, x in made.items()}
            outputs = named(chunk)(**leaves, chunk_size=16, count=torch.tensor([5, 5]))
            results.append((*outputs, *torch.autograd.grad(random_loss(outputs), list(leaves.values()))))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*results, strict=True):
        assert_close(a, b, "two threads", rtol=1e-5)


def test_chunk_equals_reference_without_forgetting():
    made = inputs(40)
    del made["log_decay"]
    chunk_equals_loop(named(chunk), named(reference), made, chunk_size=16)


@KINDS
@MOMENTUM
def test_reference_gradients_by_finite_differences(momentum, kind):
    made, count = inputs(3, kind, momentum, batch=1, H=1), torch.tensor([1])
    gradcheck64(
        lambda *xs: named(reference)(**dict(zip(made, xs, strict=True)), chunk_size=2, count=count), *made.values()
    )


@FORMS
@pytest.mark.parametrize("decay_to", ["zero", "initial"])
def test_gradient_of_the_memory_is_autograd_of_its_error(form, decay_to):
    """One token, nothing carried: the new state is decay plus one gradient step on 1/2 |M(k) - v|^2."""
    made = inputs(1, momentum=False)
    W = [made["W0"].expand(B, -1, -1, -1) + made["D0"], made["W1"].expand(B, -1, -1, -1) + made["D1"]]
    W = [w.clone().requires_grad_() for w in W]
    k, v = made["k"][:, 0, :, None], made["v"][:, 0, :, None]
    gradients = torch.autograd.grad(0.5 * (k + F.silu(k @ W[0]) @ W[1] - v).square().sum(), W)
    _, *state = named(form)(**made, chunk_size=1, decay_to=decay_to)
    alpha, eta = made["log_decay"].exp()[:, 0, :, None, None], made["eta"][:, 0, :, None, None]
    for i, (w, g) in enumerate(zip(W, gradients, strict=True)):
        rest = made[f"W{i}"] if decay_to == "initial" else 0
        expected = rest + alpha * (w - rest) - eta * g - made[f"W{i}"]
        assert_close(state[2 + i], expected.detach(), f"matrix {i}")


@FORMS
@MOMENTUM
@pytest.mark.parametrize("at", [1, 16, 41, 99])
def test_any_split_equals_the_whole(form, momentum, at):
    made, count = inputs(100, momentum=momentum), torch.full((B,), 5)
    y, *end = named(form)(**made, chunk_size=16, count=count)
    first, *state = named(form)(**cut(made, slice(0, at)), chunk_size=16, count=count)
    rest = carried(cut(made, slice(at, None)), state)
    second, *state = named(form)(**rest, chunk_size=16, count=(count + at) % 16)
    assert_close(torch.cat([first, second], 1), y, "output")
    for i, (a, b) in enumerate(zip(state, end, strict=True)):
        assert_close(a, b, f"state[{i}]")


@FORMS
def test_rows_end_at_their_own_length(form):
    made, lengths = inputs(50), torch.tensor([50, 33])
    y, *state = named(form)(**made, chunk_size=8, lengths=lengths)
    for row, n in enumerate(lengths):
        alone = {name: x if name[0] == "W" else x[row : row + 1] for name, x in made.items()}
        y_alone, *state_alone = named(form)(**cut(alone, slice(0, int(n))), chunk_size=8)
        assert_close(y[row : row + 1, :n], y_alone, f"output of row {row}")
        for a, b in zip(state, state_alone, strict=True):
            assert_close(a[row : row + 1], b, f"state of row {row}")


@FORMS
@pytest.mark.parametrize("t", [5, 15, 16])
def test_causality(form, t):
    made = inputs(40)
    before, *_ = named(form)(**made, chunk_size=16)
    changed = {n: x.clone() for n, x in made.items()}
    for name in ("q", "k", "v", "eta", "log_decay", "log_momentum"):
        changed[name][:, t:] = changed[name][:, t:].flip(1)
    after, *_ = named(form)(**changed, chunk_size=16)
    assert_close(after[:, :t], before[:, :t], "output")
    assert not torch.equal(after[:, t:], before[:, t:])


@FORMS
def test_no_state_is_the_initial_memory(form):
    made = inputs(20)
    fresh = {n: x for n, x in made.items() if n[0] not in "ADS"}
    zero = {n: torch.zeros_like(x) if n[0] in "ADS" else x for n, x in made.items()}
    for a, b in zip(named(form)(**fresh, chunk_size=8), named(form)(**zero, chunk_size=8), strict=True):
        assert_close(a, b, "fresh")


@FORMS
def test_state_is_float32_for_bfloat16_inputs_and_under_autocast(form):
    made = {n: x.bfloat16() for n, x in inputs(40).items()}
    expected = named(form)(**{n: x.float() for n, x in made.items()}, chunk_size=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *state = named(form)(**made, chunk_size=16)
    assert y.dtype == torch.bfloat16
    for a, b in zip(state, expected[1:], strict=True):
        assert_close(a, b, "state", rtol=1e-6)


def test_float32_chunk_is_close_to_the_float64_loop():
    made = inputs(300)
    ours = named(chunk)(**{n: x.float() for n, x in made.items()}, chunk_size=16)
    for a, b in zip(ours, named(reference)(**made, chunk_size=16), strict=True):
        assert_close(a.double(), b, "float32", rtol=1e-5)


def test_strong_forgetting_stays_finite_in_float32():
    made = inputs(64, dtype=torch.float32)
    made |= {n: torch.full_like(made[n], -20.0) for n in ("log_decay", "log_momentum")}
    made = {n: x.requires_grad_() for n, x in made.items()}
    sum(y.sum() for y in named(chunk)(**made, chunk_size=64)).backward()
    assert all(bool(x.grad.isfinite().all()) for n, x in made.items() if n[0] != "A")  # at a border A is not used


@FORMS
def test_what_cannot_work_is_named(form):
    made = inputs(4)
    with pytest.raises(ValueError, match="chunk_size=0"):
        named(form)(**made, chunk_size=0)
    with pytest.raises(ValueError, match="decay_to='rest'"):
        named(form)(**made, decay_to="rest")
    with pytest.raises(ValueError, match="map width 4"):
        named(form)(**(made | {"W1": torch.zeros(H, HIDDEN, K + 1)}))
    with pytest.raises(ValueError, match="state holds 6 tensors, need 4"):
        named(form)(**(made | {"log_momentum": None}))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_memory_whose_matrices_have_grown_stays_finite_where_rates_are_normalized(normalized):
    """Its curvature is above 2: without the normalization each write overshoots by more than it corrects."""
    made = inputs(600, momentum=False, batch=1, dtype=torch.float32)
    weights = tuple(8 * made.pop(name) for name in ("W0", "W1"))
    made |= {"eta": torch.full_like(made["eta"], 1 / 16), "log_decay": None}
    for name in [name for name in made if name[0] in "AD"]:
        made.pop(name)
    y, state = chunk(**made, weights=weights, chunk_size=16, decay_to="initial", normalized=normalized)
    bounded = bool(y.isfinite().all()) and float(y[:, 300:].abs().max()) < 100
    assert bounded == normalized
