"""Inner update rules: how one gradient becomes a change of the memory. Pairs of functions, composed by chain().

    rule = chain(gradient_descent("theta"), momentum("eta"), decay("alpha"))     # Titans
    state = rule.init(params)
    updates, state = rule.update(gradient, state, Write(params, inputs, dials))
    params = apply(params, updates)

Every dial of a rule (rate, kept fraction, ...) is a number, or the **name of a dial** that comes with each write as a
tensor over the independent memories. Parameters are dicts of matrices (..., K, V), rows = inputs; the paper writes
the transpose (V x K), so what the paper multiplies from the right stands on the left here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
Dial = float | str


class Write(NamedTuple):
    """What a rule may look at: the memory, the inputs of each of its matrices (..., N, K), this write's dials."""

    params: Params
    inputs: Mapping[str, Tensor]
    dials: Mapping[str, Tensor]

    def dial(self, dial: Dial) -> Tensor | float:
        """The number, or the named tensor (...) as (..., 1, 1)."""
        if not isinstance(dial, str):
            return dial
        if dial not in self.dials:
            raise ValueError(f"dial {dial!r} is missing, the write has {sorted(self.dials)}; pass it in dials")
        return self.dials[dial][..., None, None]


def _unchanged(write: Write) -> Params:
    return write.params


class Rule(NamedTuple):
    """init(params) -> state; update(gradient, state, write) -> (updates, state); prepare changes the memory before
    the error is taken (only `decay_first` needs it)."""

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Write], tuple[Params, Any]]
    prepare: Callable[[Write], Params] = _unchanged


def apply(params: Params, updates: Params) -> Params:
    """params + updates."""
    return {name: params[name] + updates[name] for name in params}


def chain(*rules: Rule) -> Rule:
    """Each rule transforms the updates of the one before; the first receives the gradient."""

    def update(updates: Params, states: list[Any], write: Write) -> tuple[Params, list[Any]]:
        new = []
        for rule, state in zip(rules, states, strict=True):
            updates, state = rule.update(updates, state, write)
            new.append(state)
        return updates, new

    def prepare(write: Write) -> Params:
        for rule in rules:
            write = write._replace(params=rule.prepare(write))
        return write.params

    return Rule(lambda params: [rule.init(params) for rule in rules], update, prepare)


def gradient_descent(eta: Dial = 1.0) -> Rule:
    """W <- W - eta grad: the proximal step of (1), (9)."""
    return _stateless(lambda u, name, write: -write.dial(eta) * u)


def decay(alpha: Dial) -> Rule:
    """Adds (alpha - 1) W: keeps the fraction alpha of the old memory; the error was taken on the undecayed one."""
    return _stateless(lambda u, name, write: u + (write.dial(alpha) - 1) * write.params[name])


def decay_first(alpha: Dial) -> Rule:
    """Keeps the fraction alpha *before* the error is taken (the gated delta rule needs this order)."""
    rule = _stateless(lambda u, name, write: u)
    return rule._replace(prepare=lambda write: {n: write.dial(alpha) * w for n, w in write.params.items()})


def momentum(mu: Dial) -> Rule:
    """m <- mu m + u, passes m on. Before gradient_descent: SGD with momentum; after it: Titans, (33)."""

    def update(updates: Params, m: Params, write: Write) -> tuple[Params, Params]:
        m = {name: write.dial(mu) * m[name] + u for name, u in updates.items()}
        return m, m

    return Rule(_zeros, update)


def dgd(eta: Dial, erase: float = 1.0) -> Rule:
    """Delta gradient descent, exact for any inputs and any number of them.

        argmin_W  <grad, W> + erase/2 |X W|^2 + |W - W_t|^2 / (2 eta)            X (N, K): inputs of the matrix
        = (I + eta erase X^T X)^-1 (W_t - eta grad)                              solved in the smaller of N and K

    One unit-norm input and erase 1 is (57); erase 0 is gradient descent. Source: (56), (57); the batch form is ours.
    """

    def step(u: Tensor, name: str, write: Write) -> Tensor:
        X, rate = write.inputs[name], write.dial(eta)
        moved = -rate * u
        W = write.params[name] + moved
        if X.shape[-2] <= X.shape[-1]:
            return moved - erased(W, X, rate * erase)
        return moved - erased_by_gram(W, X.mT @ X, rate * erase)

    return _stateless(step)


def erased(W: Tensor, X: Tensor, rate: Tensor | float) -> Tensor:
    """W - (I + rate X^T X)^-1 W, in N x N: what the inputs X (..., N, K) erase of W (..., K, V)."""
    gram = _lifted(rate * (X @ X.mT))
    return rate * X.mT @ torch.linalg.solve(gram, X @ W)


def erased_by_gram(W: Tensor, gram: Tensor, rate: Tensor | float) -> Tensor:
    """The same from gram = X^T X (..., K, K), in K x K."""
    return torch.linalg.solve(_lifted(rate * gram), rate * gram @ W)


def _lifted(A: Tensor) -> Tensor:
    """I + A."""
    return A + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def delta_momentum(
    alpha: Dial, eta: Dial, erase: Dial, side: Literal["right", "left", "scalar"] = "right", normalize: bool = True
) -> Rule:
    """m <- m (alpha I - erase G^T G) - eta G, passes m on as the update: (49) with identity preconditioner.

    `side` is where the erase stands in the paper's orientation (out x in): "right" acts on inputs (arXiv), "left" on
    outputs (NeurIPS), "scalar" is alpha - erase |G|^2. normalize divides G by its Frobenius norm in the erase alone,
    so any erase in [0, alpha] is stable. DEVIATION: (49) prints no rate before G^T G; literal is erase = eta,
    normalize=False.
    """
    if side not in ("right", "left", "scalar"):
        raise ValueError(f'side is {side!r}; use "right", "left" or "scalar"')

    def step(G: Tensor, m: Tensor, write: Write) -> Tensor:
        norm = torch.linalg.matrix_norm(G, keepdim=True)
        g = G / norm.clamp_min(torch.finfo(G.dtype).tiny) if normalize else G
        erased = {
            "right": lambda: g @ (g.mT @ m),
            "left": lambda: (m @ g.mT) @ g,
            "scalar": lambda: g.square().sum((-2, -1), keepdim=True) * m,
        }[side]()
        return write.dial(alpha) * m - write.dial(erase) * erased - write.dial(eta) * G

    def update(updates: Params, m: Params, write: Write) -> tuple[Params, Params]:
        m = {name: step(u, m[name], write) for name, u in updates.items()}
        return m, m

    return Rule(_zeros, update)


def _zeros(params: Params) -> Params:
    return {name: torch.zeros_like(w) for name, w in params.items()}


def _stateless(step: Callable[[Tensor, str, Write], Tensor]) -> Rule:
    """A rule that handles each matrix on its own and remembers nothing."""
    return Rule(lambda params: None, lambda us, state, write: ({n: step(u, n, write) for n, u in us.items()}, state))
