"""Residual memories of two layers, (89): M(z) = z + W₂ᵀ silu(W₁ᵀ z). Letters as in writes.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.derivatives import Given
from nestling.ops.self_modifying.replay import scan
from nestling.ops.self_modifying.rule import Rule
from nestling.ops.self_modifying.writes import (
    Gates,
    Matrices,
    Writes,
    commit,
    enter,
    erasing_decays,
    leave,
    read,
    read_initial,
    read_last,
    solve,
    targets,
    unit,
)


class TwoLayer:
    """The first matrices of a head share the key and are one group; each second matrix has its own key."""

    def __init__(self, weights: tuple[Tensor, ...], gates: tuple[Tensor, ...], rule: Rule) -> None:
        self.first = weights[0].transpose(1, 2).contiguous()  # (H, K, M, F)
        self.second = weights[1].flatten(0, 1).unsqueeze(2)  # (H*M, F, 1, V)
        self.memories, self.rule = weights[0].shape[1], rule
        self.parameters: Given = (*weights, *gates)
        self.gates = Gates(gates, rule.eta_max)

    def made(self, first: Tensor, second: Tensor, *gates: Tensor) -> TwoLayer:
        """The same memories with other parameters."""
        return TwoLayer((first, second), gates, self.rule)

    def enter(self, rows: int, state: tuple[Tensor, ...] | None) -> Matrices:
        first, second = (
            (None, None) if state is None else (state[0].transpose(2, 3), state[1].flatten(1, 2)[:, :, :, None])
        )
        return [enter(self.first, rows, first, self.rule), enter(self.second, rows, second, self.rule)]

    def leave(self, E: Matrices) -> tuple[Tensor, ...]:
        first, second = (leave(w, e, self.rule) for w, e in zip((self.first, self.second), E, strict=True))
        return first.transpose(2, 3), second.squeeze(3).unflatten(1, (-1, self.memories))

    def whole(
        self, z: Tensor, q: Tensor | None, E: Matrices, full: Tensor | None, chunk_size: int
    ) -> tuple[Tensor, Matrices]:
        return scan(self.made, z, q, E, self.parameters, full, chunk_size)

    def step(
        self, z: Tensor, q: Tensor | None, anchor: Matrices, running: Matrices, alive: Tensor | None
    ) -> tuple[Tensor, Matrices]:
        """One part of a chunk: y (B, H, C, V) and the matrices after it."""
        rule, rest = self.rule, self.rule.decay_to == "initial"
        S1, S2 = (self.first + anchor[0], self.second + anchor[1]) if rest else anchor
        S2 = S2.squeeze(3).unflatten(1, (-1, self.memories))  # (B, H, M, F, V)
        made = _forward(z, S1[..., :-1, :], S2[:, :, :-1])  # (B, H, M-1, C, V)
        eta, g = self.gates(made[:, :, 2], made[:, :, 3], alive)
        k, v = unit(made[:, :, 0]), unit(made[:, :, 1])
        known = slice(None) if rule.self_values else slice(-1)
        own = _forward(v, S1[..., known, :], S2[:, :, known])
        u = targets(own.transpose(2, 3), v, rule)  # (B, H, C, M, V)
        u = u.transpose(2, 3)
        a = read(k, S1).transpose(2, 3)  # (B, H, M, C, F)
        h, s = functional.silu(a), a.sigmoid()
        if rule.objective == "l2":
            u = u - (k.unsqueeze(2) + h @ S2)
        back = (u @ S2.mT) * torch.addcmul(h + s, h, s, value=-1)  # silu' = s + h (1 - s)
        at_rest = read_initial(k, self.first) if rest else None
        A = erasing_decays(g, rule.erase)
        first = solve(k, back.transpose(2, 3), at_rest, read(k, running[0]), eta, g, rule.erase, A)
        h, u, eta2 = h.flatten(1, 2), u.flatten(1, 2).unsqueeze(3), eta.flatten(1, 2).unsqueeze(2)
        if rule.erase_hidden:
            eta2 = eta2 / (1 + eta2 * h.square().sum(-1)[:, :, None])
        at_rest = read_initial(h, self.second) if rest else None
        erase = rule.erase if rule.erase_hidden else "none"
        g, A = g.flatten(1, 2).unsqueeze(2), A.flatten(1, 2).unsqueeze(2)
        second = solve(h, u, at_rest, read(h, running[1]), eta2, g, erase, A)
        y = self._read(unit(made[:, :, 4]) if q is None else q, anchor, running, first, second)
        return y, [commit(E, w) for E, w in zip(running, (first, second), strict=True)]

    def _read(self, q: Tensor, anchor: Matrices, running: Matrices, first: Writes, second: Writes) -> Tensor:
        """q (B, H, C, K) through the memory that is read."""
        hidden = functional.silu(read_last(q, self.first, anchor[0], running[0], first, self.rule))
        last = slice(self.memories - 1, None, self.memories)
        mine = Writes(second.keys[:, last], second.values[:, last], second.log_decay[:, last])
        return q + read_last(hidden, self.second[last], anchor[1][:, last], running[1][:, last], mine, self.rule)


def _forward(z: Tensor, S1: Tensor, S2: Tensor) -> Tensor:
    """z (B, H, C, K) through 2-layer memories → (B, H, M, C, V)."""
    return z.unsqueeze(2) + functional.silu(read(z, S1).transpose(2, 3)) @ S2
