"""Tiny models in float64, states compared, and the reading loop of docs/levels.md written out with torch alone."""

import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestling.core.state import tensors
from nestling.models import build
from nestling.testing import assert_close

VOCAB = 11
PLAIN = {"inner_relative": False, "inner_kappa": 0.0, "inner_bound": math.inf}  # D <- D - rate * mean gradient


def tiny(name="hope-attention", seed=0, **overrides):
    """A model of some thousand parameters."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "dim": 8, "depth": 2, "heads": 2, "hidden": 12, "chunk_size": 3}
    return build(name, **{**shape, **overrides}).double()


def text(rows, length, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, cuts=(), state=None, learn=True, **by_token):
    """Logits and state after reading `tokens` in the calls that `cuts` make."""
    borders, parts = [0, *cuts, tokens.shape[1]], []
    for a, b in zip(borders, borders[1:], strict=False):
        extra = {key: value[:, a:b] for key, value in by_token.items()}
        with torch.no_grad():
            out = model(tokens[:, a:b], state, learn=learn, **extra)
        parts.append(out.logits)
        state = out.state
    return torch.cat(parts, 1), state


def same_memory(ours, theirs, rtol=1e-9):
    """Fast weights, clocks and counts of two states agree; also the gradients that wait for a write."""
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    for path, a in ours.tree.fast.items():
        b = theirs.tree.fast[path]
        assert (a.clock.tolist(), a.writes.tolist(), a.targets.tolist()) == (
            b.clock.tolist(), b.writes.tolist(), b.targets.tolist(),
        ), path  # fmt: skip
        for what in ("delta", "gradient"):
            left, right = getattr(a, what), getattr(b, what)
            for name in left.keys() | right.keys():  # what is missing is zero: nothing yet
                assert_close(dense(left, right, name), dense(right, left, name), f"{path}.{what}.{name}", rtol)


def dense(these, others, name):
    return these[name].to_dense() if name in these else torch.zeros_like(others[name].to_dense())


def written(state):
    """The largest entry of any fast weight: a test that compares fast weights wants it well above zero."""
    return max(float(d.to_dense().abs().max()) for s in state.tree.fast.values() for d in s.delta.values())


def has_graph(state):
    return any(x.requires_grad or x.grad_fn is not None for x in tensors(state.tree))


class Whole(nn.Module):
    """Tokens and mixer states to logits and mixer states, outside any reading: plain weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mixers):
        hidden, mixers = self.model.body(tokens, mixers)
        return self.model.head(hidden), mixers


def level_weights(model):
    """{name of a weight in `Whole`: its level} for every level that writes, once per weight."""
    return {
        f"model.{path}.body.{name}.weight": level
        for path, level in model.named_modules()
        if type(level).__name__ == "ContinuumLevel" and math.isfinite(level.period)
        for name in level.maps
    }


def cut_graph(tree):
    from nestling.core.state import detach

    return detach(tree)


def by_hand(model, tokens, outer, exact=False):
    """One row (1, T) read segment by segment with `torch.func` and explicit weights W + D, rule D <- D - r * mean g.

    Returns the mean loss with its graph, all logits, and {weight name: D}.
    """
    whole, periods = Whole(model), level_weights(model)
    slow = {f"model.{n}": p for n, p in model.named_parameters()}
    segment = int(min(level.period for level in periods.values()))
    fast = {name: torch.zeros_like(slow[name]) for name in periods}
    pending = {name: torch.zeros_like(slow[name]) for name in periods}
    counts = dict.fromkeys(periods, 0)
    mixers, total, logits = [None] * len(model.blocks), 0.0, []
    for start in range(0, tokens.shape[1], segment):
        piece, goal = tokens[:, start : start + segment], tokens[0, start + 1 : start + segment + 1]
        here = {name: slow[name] + fast[name] for name in periods}
        with sdpa_kernel(SDPBackend.MATH):  # the only one that can be differentiated twice
            out, mixers = functional_call(whole, {**slow, **here}, (piece, mixers))
        loss = functional.cross_entropy(out[0, : len(goal)], goal, reduction="sum")
        logits.append(out)
        total = total + loss
        mixers = cut_graph(mixers) if outer == "segment" else mixers
        if start + segment >= tokens.shape[1]:
            break
        grads = torch.autograd.grad(loss, list(here.values()), retain_graph=True, create_graph=exact)
        for (name, level), grad in zip(periods.items(), grads, strict=True):
            pending[name] = pending[name] + grad
            counts[name] += segment
            if counts[name] == level.period:
                rate = level.inner_log_rate.exp()
                fast[name] = fast[name] - rate * pending[name] / counts[name]
                fast[name] = fast[name] if exact else fast[name].detach()
                pending[name], counts[name] = torch.zeros_like(grad), 0
    return total / (tokens.shape[1] - 1), torch.cat(logits, 1), fast
