"""outer="sequence" in long calls: segments are read again for the outer gradient instead of keeping their graph."""

import math

import pytest
import torch

from nestling.models import State, reader
from nestling.testing import assert_close
from tests.models.tiny import PLAIN, by_hand, read, same_memory, text, tiny

FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.5, "outer": "sequence"}
KINDS = {
    "hope": ("hope", {}),
    "window, erase": ("hope-attention", {"inner_erase": 0.5, "window": 6}),
    "learned": ("hope-attention", {"inner_learned": True}),
    "static": ("hope", {"inner_lr": 0.0}),
}


def step(model, *arguments, **options):
    model.zero_grad()
    loss, state = model.loss(*arguments, **options)
    loss.backward()
    return loss.detach(), state, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def replay(monkeypatch):
    """From here on every call is long enough."""
    return lambda: monkeypatch.setattr(reader, "GRAPH_TOKENS", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_the_kept_graph(kind, replay):
    """Whole segments, then rows of mixed ages with a mask and a document border, whose pieces end anywhere."""
    name, options = KINDS[kind]
    model = tiny(name, **{**FAST, **options})
    before = State.stack([read(model, text(1, n, seed=n))[1] for n in (3, 8)])
    mask, borders = torch.ones(2, 15, dtype=torch.bool), torch.zeros(2, 15, dtype=torch.bool)
    mask[0, 3:6], borders[1, 9] = False, True
    calls = [((text(2, 18),), {}), ((text(2, 15),), {"state": before, "mask": mask, "new_document": borders})]
    kept = [step(model, *tokens, **more) for tokens, more in calls]
    replay()
    for (tokens, more), (loss, state, gradients) in zip(calls, kept, strict=True):
        again, after, ours = step(model, *tokens, **more)
        assert_close(again, loss, "loss", 1e-12)
        same_memory(after, state, 1e-10)
        assert ours.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert_close(ours[parameter], gradient, parameter, 1e-10)


@pytest.mark.parametrize("kind", ["hope", "hope-attention"])
def test_the_loop_written_by_hand(kind, replay):
    replay()
    model, tokens = tiny(kind, **FAST, **PLAIN), text(1, 22)
    _, _, ours = step(model, tokens)
    model.zero_grad()
    by_hand(model, tokens, "sequence")[0].backward()
    for name, p in model.named_parameters():
        assert_close(ours[name], p.grad, name, 1e-9)


def test_under_autocast_both_passes_have_one_precision(replay):
    model, tokens = tiny("hope-attention", **{**FAST, "inner_lr": 0.02}).float(), text(2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, tokens)
        replay()
        ours = step(model, tokens)
    assert_close(ours[0], expected[0], "loss", 1e-3)
    assert_close(ours[2]["head.weight"], expected[2]["head.weight"], "head", 2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(tokens)
    model.zero_grad()
    loss.backward()  # outside: the second pass remembers the precision of the first
    assert_close(model.head.weight.grad, ours[2]["head.weight"], "backward outside", 1e-6)


def test_what_a_call_keeps_does_not_hold_its_activations(replay):
    model, tokens = tiny("hope", **FAST, hidden=96, chunk_size=4), text(2, 48)
    before = kept_bytes(model, tokens)
    replay()
    assert kept_bytes(model, tokens) < 0.4 * before


def kept_bytes(model, tokens):
    """Bytes that the graph of a loss still holds when `loss` returns."""
    alive = {}

    class Kept:
        def __init__(self, x):
            self.x = x
            alive[id(self)] = x.untyped_storage()

        def __del__(self):
            del alive[id(self)]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        loss, _ = model.loss(tokens)
    size = sum({x.data_ptr(): x.nbytes() for x in alive.values()}.values())
    assert loss.requires_grad
    return size
