"""Self-modifying Titans: chunk form = token loop, forward and every gradient; the loop passes gradcheck."""

import pytest
import torch

from nestling.ops.self_modifying import Rule, chunk, fused, reference

KINDS = ("linear", "features", "mlp")
LITERAL = Rule(objective="l2", erase="undecayed", decay_to="zero", read="anchor", self_values=True, eta_max=0.5)
RULES = {
    "default": Rule(),
    "literal": LITERAL,
    "literal, causal": Rule(objective="l2", erase="undecayed", decay_to="zero", self_values=True, eta_max=0.5),
    "literal, dot": Rule(erase="undecayed", decay_to="zero", eta_max=1.0),
    "undecayed, initial": Rule(erase="undecayed", eta_max=1.0),
    "decayed, zero": Rule(decay_to="zero"),
    "l2, initial": Rule(objective="l2", eta_max=0.5),
    "no erase": Rule(erase="none"),
    "no erase, l2, zero": Rule(erase="none", objective="l2", decay_to="zero", eta_max=0.5),
    "anchor": Rule(read="anchor"),
    "hidden erase": Rule(erase_hidden=True, eta_max=1.0),
    "hidden erase, undecayed": Rule(erase_hidden=True, erase="undecayed", eta_max=1.0, objective="dot"),
    "hidden erase, l2, zero": Rule(erase_hidden=True, objective="l2", decay_to="zero", eta_max=0.5, self_values=True),
}


def inputs(
    kind, tokens, *, adaptive_q=False, rows=2, heads=2, width=4, hidden=6, state=True, count=None, generator_rate=1.0
):
    """Leaves of one call, float64, by argument name; decays between about 0.7 and 1.

    Memories that rewrite their own generators at full rate are chaotic: rounding grows tenfold every hundred
    tokens or so. Long comparisons take the small generator rates that the layer starts from.
    """
    memories = 6 if adaptive_q else 5

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, dtype=torch.float64) * scale

    shapes = {"linear": [(width, width)], "features": [(hidden, width)], "mlp": [(width, hidden), (hidden, width)]}
    weights = tuple(normal(heads, memories, *s, scale=s[0] ** -0.5) for s in shapes[kind])
    return {
        "z": normal(rows, tokens, heads, width),
        "q": None if adaptive_q else torch.nn.functional.normalize(normal(rows, tokens, heads, width), dim=-1),
        "weights": weights,
        "gate_weight": normal(2, heads, width),
        "gate_bias": torch.tensor([[0.0], [3.0]], dtype=torch.float64).repeat(1, heads),
        "rates": torch.rand(heads, memories, dtype=torch.float64) * generator_rate,
        "features": normal(heads, width, hidden) if kind == "features" else None,
        "anchor": tuple(normal(rows, *w.shape, scale=0.2) for w in weights) if state else (),
        "running": tuple(normal(rows, *w.shape, scale=0.2) for w in weights) if state else (),
        "count": torch.zeros(rows, dtype=torch.long) if count is None else torch.tensor(count),
    }


def leaves(tree):
    """The tensors of an argument dictionary, in order."""
    flat = [t for x in tree.values() for t in (x if isinstance(x, tuple) else (x,)) if t is not None]
    return [t for t in flat if t.is_floating_point()]


def call(form, arguments, **options):
    """At a chunk border the anchor is the running state."""
    given = dict(arguments)
    border = (given["count"] == 0).view(-1, 1, 1, 1, 1)
    anchor, running = given.pop("anchor"), given.pop("running")
    if anchor:
        given["state"] = (*(torch.where(border, r, a) for a, r in zip(anchor, running, strict=True)), *running)
    places = [given.pop(n) for n in ("z", "q", "weights", "gate_weight", "gate_bias", "rates")]
    return form.self_modifying(*places, **given, **options)


def forward_and_gradients(form, arguments, lengths, **options):
    """Outputs, final state, and the gradient of a fixed random functional of both in every input."""
    for leaf in leaves(arguments):
        leaf.requires_grad_()
    y, state = call(form, arguments, lengths=lengths, **options)
    if lengths is not None:  # what padding returns is arbitrary
        y = y * (torch.arange(y.shape[1]) < lengths[:, None])[..., None, None]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (y, *state))
    grads = torch.autograd.grad(loss, leaves(arguments), allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves(arguments), strict=True)]
    return [y, *state, *zero]


def assert_forms_agree(kind, rule, tokens, chunk_size, *, lengths=None, **options):
    arguments = inputs(kind, tokens, **options)
    lengths = None if lengths is None else torch.tensor(lengths)
    got = forward_and_gradients(chunk, arguments, lengths, rule=rule, chunk_size=chunk_size)
    want = forward_and_gradients(reference, arguments, lengths, rule=rule, chunk_size=chunk_size)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()), msg=lambda m, i=i: f"{i}: {m}"
        )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_of_every_memory(kind, rule):
    assert_forms_agree(kind, RULES[rule], 11, 4)


@pytest.mark.parametrize("tokens", [1, 63, 100])
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_lengths_and_chunk_sizes(kind, chunk_size, tokens):
    rule = Rule(erase_hidden=True, eta_max=1.0) if kind == "mlp" else Rule()
    assert_forms_agree(kind, rule, tokens, chunk_size, rows=1, generator_rate=0.1)


@pytest.mark.parametrize(
    ("kind", "chunk_size", "tokens"),
    [
        ("linear", 1, 1000),
        ("features", 64, 1000),
        ("mlp", 16, 1000),
        *((kind, 64, 4096) for kind in ("linear", "features", "mlp")),
    ],
)
def test_long_sequences(kind, chunk_size, tokens):
    rule = Rule(erase_hidden=True, eta_max=1.0) if kind == "mlp" else Rule()
    rate = 0.02 if tokens > 1000 else 0.1
    assert_forms_agree(kind, rule, tokens, chunk_size, rows=1, heads=1, count=[0], generator_rate=rate)


CASES = [
    ("features", "default", {"lengths": [40, 33, 7], "count": [0, 1, 3]}),
    ("features", "default", {}),
    ("linear", "default", {"count": [2, 2, 2]}),
    ("mlp", "hidden erase", {"lengths": [40, 33, 7]}),
    ("linear", "l2, initial", {"adaptive_q": True}),
]


def of_case(kind, rule, options, form=chunk):
    torch.manual_seed(3)
    options = dict(options)
    lengths = options.pop("lengths", None)
    arguments = inputs(kind, 40, rows=3, **options)
    lengths = None if lengths is None else torch.tensor(lengths)
    return forward_and_gradients(form, arguments, lengths, rule=RULES[rule], chunk_size=4)


@pytest.mark.parametrize("budget", [0, 100_000])  # nothing; the last chunks
@pytest.mark.parametrize(("kind", "rule", "options"), CASES)
def test_a_backward_pass_that_recomputes_gives_the_same_bits(kind, rule, options, budget, monkeypatch):
    kept = of_case(kind, rule, options)
    monkeypatch.setattr(fused, "KEEP_BYTES", budget)
    assert all(torch.equal(a, b) for a, b in zip(of_case(kind, rule, options), kept, strict=True))


@pytest.mark.parametrize(("kind", "rule", "options"), CASES)
def test_no_uninitialised_memory_is_read(kind, rule, options, monkeypatch):
    clean, poisoned = of_case(kind, rule, options), []

    def poison(make):
        def made(*args, **options):
            x = make(*args, **options)
            poisoned.append(x)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-(10**6))

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    got = of_case(kind, rule, options)
    monkeypatch.undo()
    assert poisoned
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize(("kind", "rule", "options"), [CASES[0], CASES[-1]])
def test_two_threads_give_the_numbers_of_one(kind, rule, options):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(of_case(kind, rule, options))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_generated_queries_fresh_state_and_ragged_rows(kind):
    assert_forms_agree(kind, Rule(), 11, 4, adaptive_q=True, state=False)
    assert_forms_agree(kind, Rule(), 11, 4, rows=4, lengths=[11, 7, 4, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "count", "lengths"),
    [
        (9, [3, 3, 3], None),
        (2, [1, 1, 1], None),
        (1, [3, 0, 1], None),
        (1, [3, 0, 1], [1, 1, 0]),
        (9, [0, 3, 1], None),
        (10, [2, 3, 3], [10, 0, 4]),
        (9, [1, 1, 1], [2, 9, 3]),
        (3, [0, 1, 2], [1, 2, 3]),
        (8, [0, 0, 0], [4, 8, 3]),
    ],
    ids=str,
)
def test_an_open_chunk_goes_on(kind, tokens, count, lengths):
    """Rows at any place of their chunk, of any length."""
    assert_forms_agree(kind, Rule(), tokens, 4, rows=3, count=count, lengths=lengths)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_open_chunk_goes_on_under_every_rule(kind, rule):
    assert_forms_agree(kind, RULES[rule], 6, 4, rows=2, count=[3, 1])


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("linear", "default"), ("features", "l2, initial"), ("mlp", "hidden erase"), ("mlp", "literal")],
)
def test_gradcheck_of_the_reference(kind, rule):
    arguments = inputs(kind, 3, rows=1, heads=1, width=2, hidden=2, count=[1])
    run, tensors = as_function(reference, arguments, rule=RULES[rule], chunk_size=2)
    assert torch.autograd.gradcheck(run, tensors)


def as_function(form, arguments, **options):
    """A call as a function of all its leaves, and the leaves."""
    parts = {n: x if isinstance(x, tuple) else (x,) for n, x in arguments.items() if n != "count" and x is not None}
    tensors = [t.requires_grad_() for part in parts.values() for t in part]

    def run(*given):
        given, changed = iter(given), dict(arguments)
        for name, part in parts.items():
            fresh = tuple(next(given) for _ in part)
            changed[name] = fresh if isinstance(arguments[name], tuple) else fresh[0]
        y, state = call(form, changed, **options)
        return (y, *state)

    return run, tensors


@pytest.mark.parametrize(
    ("kind", "rule", "count"),
    [("features", "default", [0]), ("linear", "default", [1]), ("linear", "l2, initial", [0]), ("mlp", "literal", [0])],
)
def test_second_derivatives_of_the_chunk_form(kind, rule, count):
    arguments = inputs(kind, 4, rows=1, heads=1, width=2, hidden=1, count=count)
    run, tensors = as_function(chunk, arguments, rule=RULES[rule], chunk_size=2)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_without_gradients_the_numbers_are_the_same():
    arguments = inputs("features", 11)
    y, state = call(chunk, arguments, rule=Rule(), chunk_size=4)  # no leaf asks for a gradient: the plain loop
    arguments["z"].requires_grad_()
    y2, state2 = call(chunk, arguments, rule=Rule(), chunk_size=4)
    torch.testing.assert_close(y2, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state2, state, rtol=1e-12, atol=1e-12)


def test_float32_stays_close_to_float64():
    arguments = inputs("features", 300, width=8, hidden=8, state=False)
    exact, _ = call(chunk, arguments, rule=Rule(), chunk_size=64)
    single = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    single["weights"], single["count"] = tuple(w.float() for w in arguments["weights"]), arguments["count"]
    y, _ = call(chunk, single, rule=Rule(), chunk_size=64)
    assert y.dtype == torch.float32
    assert (y - exact).square().mean().sqrt() < 1e-5 * exact.square().mean().sqrt()


def test_strong_decay_does_not_overflow():
    arguments = inputs("linear", 200, state=False)
    arguments["gate_bias"] = torch.tensor([[0.0], [-40.0]], dtype=torch.float64).repeat(1, 2)
    for value in forward_and_gradients(chunk, arguments, None, rule=Rule(), chunk_size=64):
        assert value.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "l2"}, "lower eta_max"),
        ({"erase": "undecayed", "eta_max": 1.5}, "lower eta_max"),
        ({"erase": "sometimes"}, "use one of"),
        ({"read": "future"}, "use one of"),
    ],
)
def test_a_rule_that_cannot_be_stable_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Rule(**options)


def test_wrong_shapes_are_refused():
    arguments = inputs("linear", 3)
    with pytest.raises(ValueError, match="chunk_size"):
        call(chunk, arguments, rule=Rule(), chunk_size=0)
    with pytest.raises(ValueError, match="5, and one more"):
        call(chunk, {**arguments, "q": None}, rule=Rule(), chunk_size=2)
    with pytest.raises(ValueError, match="not 3 to 3"):
        call(chunk, {**arguments, "z": arguments["z"][..., :3]}, rule=Rule(), chunk_size=2)
