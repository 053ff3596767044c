"""loss(): the gradients of the plain cross-entropy, and of a segment loop written out by hand; exact meta-gradients."""

import copy
import math
import weakref

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from nestling.models import State
from nestling.testing import assert_close
from tests.models.tiny import (
    PLAIN,
    VOCAB,
    Whole,
    by_hand,
    has_graph,
    level_weights,
    read,
    same_memory,
    text,
    tiny,
    written,
)

FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.05}
KINDS = {
    "hope-attention": ("hope-attention", FAST),
    "hope": ("hope", FAST),
    "learned": ("hope-attention", {**FAST, "inner_learned": True}),
    "adam, erase, window": ("hope-attention", {**FAST, "inner_rule": "adam", "inner_erase": 0.5, "window": 6}),
    "muon": ("hope-attention", {**FAST, "inner_rule": "muon"}),
    "nested": ("hope-attention", {"periods": (4, 8), "inner_lr": 0.05, "continuum": "nested"}),
    "transformer": ("transformer", {}),
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours, theirs, rtol=1e-10):
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert_close(ours[name], grad, name, rtol)
    assert any(float(g.abs().max()) > 1e-4 for g in ours.values())


def cross_entropy(logits, targets):
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("outer", ["segment", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_has_the_gradients_of_the_cross_entropy_of_the_logits(kind, outer):
    name, options = KINDS[kind]
    model, tokens = tiny(name, outer=outer, **options), text(2, 23)
    loss, state = model.loss(tokens)
    out = model(tokens)
    plain = cross_entropy(out.logits[:, :-1], tokens[:, 1:])
    assert_close(loss.detach(), plain.detach(), "loss", 1e-12)
    same_gradients(gradients(model, loss), gradients(model, plain))
    same_memory(state, out.state)


@pytest.mark.parametrize("outer", ["segment", "sequence"])
@pytest.mark.parametrize("kind", ["hope-attention", "hope", "learned"])
def test_also_with_targets_masks_and_a_state_of_mixed_ages(kind, outer):
    name, options = KINDS[kind]
    model = tiny(name, outer=outer, **options)
    before = State.stack([read(model, text(1, n, seed=n))[1] for n in (3, 8, 14)])
    tokens, targets = text(3, 15), text(3, 15, seed=8)
    targets[1, 4:9] = -1
    mask = torch.rand(3, 15, generator=torch.Generator().manual_seed(4)) > 0.25
    for more in ({}, {"mask": mask}):
        loss, _ = model.loss(tokens, targets, state=before, **more)
        # The same targets must reach the levels: the reader takes them from `loss`, so its own logits are compared.
        ours = gradients(model, loss)
        plain, value = reference_loss(model, tokens, targets, before, more.get("mask"))
        assert_close(loss.detach(), value, "loss", 1e-12)
        same_gradients(ours, plain)


def reference_loss(model, tokens, targets, before, mask):
    """Gradients of the same loss kept in one graph: what `bptt=0` and `outer` mean, without the early backward."""
    from nestling.models.packing import pack
    from nestling.models.reader import Reader

    packed, _ = pack(tokens, targets, mask, None, VOCAB)
    reader = Reader(model, packed, learn=True, logits=True, score=False)
    reader.run(before.tree)
    loss = cross_entropy(torch.cat(reader.logits, 1), packed.targets[:, : int(packed.lengths.max())].clamp_min(-1))
    return gradients(model, loss), loss.detach()


def test_targets_of_a_contiguous_stream_are_the_next_tokens():
    model, stream = tiny(**FAST), text(2, 30)
    whole, end = model.loss(stream[:, :-1], stream[:, 1:])
    state, total = None, 0.0
    for a, b in ((0, 8), (8, 13), (13, 29)):
        loss, state = model.loss(stream[:, a:b], stream[:, a + 1 : b + 1], state=state)
        total += loss.item() * (b - a)
    assert total / 29 == pytest.approx(whole.item(), rel=1e-12)
    same_memory(state, end)
    _, read_only = read(model, stream[:, :-1])
    same_memory(end, read_only)


def test_positions_without_target_teach_nothing():
    model, tokens = tiny(**FAST), text(1, 12)
    nothing = torch.full_like(tokens, -1)
    nothing[0, -1] = 3
    _, state = model.loss(tokens, nothing)
    assert state.writes.tolist() == [[2, 1]] and written(state) == 0
    with pytest.raises(ValueError, match="no position has a target"):
        model.loss(tokens, torch.full_like(tokens, -1))


@pytest.mark.parametrize("outer", ["segment", "sequence"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("hope-attention", {}), ("hope", {}), ("hope-attention", {"dim": 16, "hidden": 192})],
    ids=["hope-attention", "hope", "wide: gradients stay factored"],
)
def test_outer_modes_are_the_loops_written_by_hand(kind, shape, outer):
    model, tokens = tiny(kind, outer=outer, **{**FAST, "inner_lr": 0.5}, **PLAIN, **shape), text(1, 22)
    loss, state = model.loss(tokens)
    mean, logits, fast = by_hand(model, tokens, outer)
    assert_close(loss.detach(), mean.detach(), "loss", 1e-10)
    assert_close(read(model, tokens)[0], logits.detach(), "logits", 1e-10)
    ours = gradients(model, loss)
    same_gradients(ours, gradients(model, by_hand(model, tokens, outer)[0]), 1e-9)
    for name in level_weights(model):
        path, _, weight = name.removeprefix("model.").removesuffix(".weight").rpartition(".body.")
        assert_close(state.tree.fast[path].delta[weight].to_dense()[0], fast[name], name, 1e-9)
    other = gradients(model, by_hand(model, tokens, {"segment": "sequence", "sequence": "segment"}[outer])[0])
    assert max(float((other[n] - g).abs().max()) for n, g in ours.items()) > 1e-5


@pytest.mark.parametrize("kind", ["hope-attention", "hope"])
def test_exact_meta_gradients_are_those_of_the_loop_and_differ_from_first_order(kind):
    options = {**FAST, **PLAIN, "inner_lr": 0.5, "outer": "sequence"}
    tokens = text(1, 22)
    exact, first = tiny(kind, bptt=9, **options), tiny(kind, bptt=0, **options)
    ours = gradients(exact, exact.loss(tokens)[0])
    same_gradients(ours, gradients(exact, by_hand(exact, tokens, "sequence", exact=True)[0]), 1e-8)
    cheap = gradients(first, first.loss(tokens)[0])
    assert max(float((cheap[n] - g).abs().max()) for n, g in ours.items()) > 1e-3


RULES = {
    "two levels": {},
    "relative, clipped": {"inner_relative": True, "inner_bound": 0.3, "inner_lr": (0.05, 0.5, 0.1)},
    "metric": {"inner_kappa": 3.0, "inner_relative": True, "inner_bound": 10.0},
    "momentum, decay": {"inner_rule": "momentum", "inner_decay": 0.2},
    "adam, erase": {"inner_rule": "adam", "inner_erase": 0.5, "inner_lr": 0.02},
    "online": {"inner_kappa": 3.0, "inner_online": True},
    "nested": {"periods": (3, 6), "inner_lr": 0.3, "continuum": "nested"},
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_exact_meta_gradients_agree_with_finite_differences(rule, rows):
    """Also for a learned rate, and (two rows) where segments must be read again because rows have different ages."""
    options = {"periods": (3, 6, math.inf), "inner_lr": 0.3, "inner_learned": True, **PLAIN, **RULES[rule]}
    model = tiny(dim=4, hidden=6, bptt=99, outer="sequence", **options)
    if rule == "metric":
        model.calibrate(text(2, 20, seed=5))
    tokens, mask = text(rows, 14), torch.ones(rows, 14, dtype=torch.bool)
    mask[1:, 2:4] = False
    ours = gradients(model, model.loss(tokens, mask=mask)[0])
    generator = torch.Generator().manual_seed(0)
    rates = [n for n in ours if "inner_log_rate" in n]
    assert rates
    for name in [*rates, "embedding.weight", "blocks.0.channel.stack.0.body.up.weight", "blocks.0.mixer.qkv.weight"]:
        p = model.get_parameter(name)
        way = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        slope = difference(model, p, way, tokens, mask)
        assert float((ours[name] * way).sum()) == pytest.approx(slope, rel=2e-5, abs=1e-8), name


def difference(model, p, way, tokens, mask, eps=1e-6):
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            p.add_(way, alpha=sign * eps)
            values.append(float(model.loss(tokens, mask=mask)[0]))
            p.add_(way, alpha=-sign * eps)
    return (values[0] - values[1]) / (2 * eps)


def test_bptt_counts_writes():
    """With bptt=1 every second write has a graph; with as many as there are writes, all do."""
    tokens, options = text(1, 17), {"periods": (4,), "inner_lr": 0.5, "outer": "sequence", **PLAIN}
    found = []
    for bptt in (0, 1, 2, 4, 9):
        model = tiny(bptt=bptt, **options)
        found.append(gradients(model, model.loss(tokens)[0])["embedding.weight"])
    assert_close(found[3], found[4], "more than there are writes", 1e-12)
    for a, b in ((0, 1), (1, 2), (2, 3)):
        assert float((found[a] - found[b]).abs().max()) > 1e-5, (a, b)


class Graph:
    """Stands in the graph of one segment, and lives as long as that."""


@pytest.mark.parametrize("periods", [(4,), (4, 8)])
def test_a_truncated_exact_gradient_keeps_no_more_of_a_longer_text(periods):
    """With outer="segment" nothing before a cut is needed again: it gives the same gradients in bounded memory."""
    model = tiny(bptt=1, periods=periods, inner_lr=0.5, inner_learned=True, **PLAIN)
    body, alive, most = model.body, weakref.WeakSet(), []

    def marked(*inputs):
        hidden, mixers = body(*inputs)
        graph = hidden.grad_fn.metadata["segment"] = Graph()
        alive.add(graph)
        most[-1] = max(most[-1], len(alive))
        return hidden, mixers

    for segments in (6, 12):
        tokens = text(1, 4 * segments + 1)
        most.append(0)
        model.body = marked
        loss, state = model.loss(tokens)
        ours = gradients(model, loss)
        model.body = body
        assert not has_graph(state)
        same_gradients(ours, gradients(model, cross_entropy(model(tokens).logits[:, :-1], tokens[:, 1:])))
    assert most[0] == most[1] < 6


def test_the_first_order_slope_of_a_learned_rate():
    """dL/d log r = <dL/dD, D>, segment by segment with the D in force."""
    model, tokens = tiny(periods=(4,), inner_lr=0.5, inner_learned=True, outer="sequence", **PLAIN), text(1, 14)
    ours = gradients(model, model.loss(tokens)[0])
    mean, expected = slopes_by_hand(model, tokens)
    assert_close(model.loss(tokens)[0].detach(), mean, "loss", 1e-10)
    for path, slope in expected.items():
        name = f"{path}.inner_log_rate"
        assert_close(ours[name], slope, name, 1e-9)


def slopes_by_hand(model, tokens):
    whole, levels = Whole(model), level_weights(model)
    slow = {f"model.{n}": p for n, p in model.named_parameters()}
    fast = {n: torch.zeros_like(slow[n], requires_grad=True) for n in levels}
    mixers, total, used = [None, None], 0.0, []
    for start in range(0, 14, 4):
        here = {n: slow[n] + d for n, d in fast.items()}
        out, mixers = functional_call(whole, {**slow, **here}, (tokens[:, start : start + 4], mixers))
        goal = tokens[0, start + 1 : start + 5]
        loss = functional.cross_entropy(out[0, : len(goal)], goal, reduction="sum")
        total = total + loss / 13
        used.append(fast)
        grads = torch.autograd.grad(loss, list(fast.values()), retain_graph=True)
        fast = {
            n: (d - levels[n].inner_log_rate.exp() * g / 4).detach().requires_grad_()
            for (n, d), g in zip(fast.items(), grads, strict=True)
        }
    slopes = {}
    for ds in used:
        for name, grad in zip(ds, torch.autograd.grad(total, list(ds.values()), retain_graph=True), strict=True):
            path = name.removeprefix("model.").partition(".body.")[0]
            slopes[path] = slopes.get(path, 0) + (grad * ds[name]).sum().detach()
    return total.detach(), slopes


def test_backward_adds_up_over_calls():
    model, tokens = tiny(**FAST), text(2, 15)
    one, two = (gradients(model, model.loss(part)[0]) for part in (tokens, text(2, 15, seed=3)))
    model.zero_grad()
    (0.5 * model.loss(tokens)[0]).backward()
    (2.0 * model.loss(text(2, 15, seed=3))[0]).backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, 0.5 * one[name] + 2.0 * two[name], name, 1e-12)


def test_frozen_parameters_get_no_gradient_and_change_none():
    model, tokens = tiny(**FAST), text(2, 15)
    expected = gradients(model, model.loss(tokens)[0])
    for p in model.embedding.parameters():
        p.requires_grad_(False)
    ours = gradients(model, model.loss(tokens)[0])
    assert "embedding.weight" not in ours
    same_gradients(ours, {n: g for n, g in expected.items() if n != "embedding.weight"})
    for p in model.parameters():
        p.requires_grad_(False)
    loss, state = model.loss(tokens)
    assert not loss.requires_grad and written(state) > 1e-3


def test_loss_without_grad_mode_still_writes():
    model, tokens = tiny(**FAST), text(2, 15)
    with torch.no_grad():
        loss, state = model.loss(tokens)
    assert not loss.requires_grad and not has_graph(state)
    same_memory(state, model.loss(tokens)[1])


def test_documents_in_training():
    model, tokens = tiny(**FAST, reset="document"), text(2, 15)
    starts = torch.zeros(2, 15, dtype=torch.bool)
    starts[:, 7] = True
    loss, _ = model.loss(tokens, new_document=starts)
    parts = [model.loss(tokens[:, :7])[0], model.loss(tokens[:, 7:])[0]]
    assert_close(loss.detach(), ((6 * parts[0] + 7 * parts[1]) / 13).detach(), "loss", 1e-12)


def test_autocast_keeps_fast_weights_in_float32():
    model, tokens = tiny(**{**FAST, "inner_erase": 0.5, "inner_online": True}).float(), text(2, 40)
    model.calibrate(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss, state = model.loss(tokens)
        with torch.no_grad():
            out = model(tokens, state)
    loss.backward()
    assert loss.dtype == torch.float32 and all(bool(p.grad.isfinite().all()) for p in model.parameters())
    for level in out.state.tree.fast.values():
        for delta in level.delta.values():
            assert delta.to_dense().dtype == torch.float32 and bool(delta.to_dense().isfinite().all())
        assert {g.to_dense().dtype for g in level.gradient.values()} <= {torch.float32}
    same, _ = model.loss(tokens)
    assert loss.item() == pytest.approx(same.item(), rel=0.02)


def test_a_copy_is_a_model_of_its_own():
    model, tokens = tiny("hope", **FAST), text(2, 15)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    original = tiny("hope", **FAST)
    ours, state = read(twin, tokens)
    theirs, end = read(original, tokens)
    assert torch.equal(ours, theirs)
    same_memory(state, end, 1e-12)
    assert torch.equal(read(twin, tokens, state=end)[0], read(original, tokens, state=end)[0])  # equal fingerprints
