"""Memories that are linear in what is written: M(z) = Wᵀ φ(z), φ fixed. Letters as in writes.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.ops.self_modifying.causal_read import causal_read
from nestling.ops.self_modifying.derivatives import Given, learns
from nestling.ops.self_modifying.features import phi
from nestling.ops.self_modifying.fused import Results, write_chunks
from nestling.ops.self_modifying.replay import scan
from nestling.ops.self_modifying.rule import Rule
from nestling.ops.self_modifying.writes import (
    Gates,
    Matrices,
    Writes,
    commit,
    enter,
    leave,
    read,
    read_initial,
    read_last,
    solve,
    targets,
    unit,
)
from nestling.ops.walk import pick

Writer = Callable[..., Results]  # as fused.write_chunks


class OneLayer:
    """All memories of a head are one group, (B, H, F, M, V)."""

    def __init__(
        self,
        weight: Tensor,
        features: Tensor | None,
        gates: tuple[Tensor, ...],
        rule: Rule,
        writer: Writer | None = None,
    ) -> None:
        self.initial, self.features, self.rule = weight.transpose(1, 2).contiguous(), features, rule
        self.writer = writer
        self.parameters: Given = (weight, features, *gates)
        self.gates = Gates(gates, rule.eta_max)

    def enter(self, rows: int, state: tuple[Tensor, ...] | None) -> Matrices:
        return [enter(self.initial, rows, None if state is None else state[0].transpose(2, 3), self.rule)]

    def leave(self, E: Matrices) -> tuple[Tensor, ...]:
        return (leave(self.initial, E[0], self.rule).transpose(2, 3),)

    def phi(self, z: Tensor) -> Tensor:
        return phi(z, self.features)

    def step(
        self, z: Tensor, q: Tensor | None, anchor: Matrices, running: Matrices, alive: Tensor | None
    ) -> tuple[Tensor, Matrices]:
        """One part of a chunk: y (B, H, C, V) and the matrices after it."""
        written, made = self.write(self.phi(z), anchor[0], running[0], alive)
        q = self.phi(unit(made[4]) if q is None else q)
        y = read_last(q, self.initial, anchor[0], running[0], written, self.rule)
        return y, [commit(running[0], written)]

    def write(
        self, phi_z: Tensor, anchor: Tensor, running: Tensor, alive: Tensor | None
    ) -> tuple[Writes, list[Tensor]]:
        """The writes of one part, and what each memory but the last made of z: k, v, eta, alpha (, q)."""
        rule = self.rule
        rest = rule.decay_to == "initial"
        S = self.initial + anchor if rest else anchor
        generators = S.shape[-2] - 1
        made = read(phi_z, S, generators).unbind(-2)  # (B, H, C, V) each
        eta, g = self.gates(made[2], made[3], alive)
        k, v = self.phi(unit(made[0])), unit(made[1])
        u = targets(read(self.phi(v), S, None if rule.self_values else generators), v, rule)
        if rule.objective == "l2":
            u = u - read(k, S)
        at_rest = read_initial(k, self.initial) if rest else None
        return solve(k, u, at_rest, read(k, running), eta, g, rule.erase), list(made)

    def made(self, weight: Tensor, features: Tensor | None, *gates: Tensor) -> OneLayer:
        """The same memories with other parameters."""
        return OneLayer(weight, features, gates, self.rule)

    def whole(
        self, z: Tensor, q: Tensor | None, E: Matrices, full: Tensor | None, chunk_size: int
    ) -> tuple[Tensor, Matrices]:
        """Whole chunks; under the default rule through the backward pass that is written out."""
        rule, (_, features, *gates) = self.rule, self.parameters
        tensors = (self.phi(z), self.initial, features, *gates, E[0])
        writer = self.writer or (write_chunks if learns(*tensors) else None)
        if writer is None or q is None or not rule.is_default:
            return scan(self.made, z, q, E, self.parameters, full, chunk_size)
        keys, values, g, starts, final = writer(self.record, full, chunk_size, rule.eta_max, *tensors)
        return causal_read(q, features, self.initial[..., -1, :], keys, values, g, starts), [final]

    def record(
        self, full: Tensor | None, chunk_size: int, eta_max: float, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `write_chunks` returns, by the loop."""
        phi_z, initial, features, *gates, E = tensors
        memories = self.made(initial.transpose(1, 2), features, *gates)
        rows = []
        for i, z in enumerate(phi_z.split(chunk_size, 2)):
            written, _ = memories.write(z, E, E, None)
            rows.append((written.keys, written.values[:, :, -1], written.log_decay[:, :, -1], E[..., -1, :]))
            (E,) = pick(None if full is None else full[i], [commit(E, written)], [E])
        keys, values, g, starts = (torch.stack(x, 2) for x in zip(*rows, strict=True))
        return keys, values, g, starts, E
