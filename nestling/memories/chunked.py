"""The memory inside Titans layers: one per head, written by its own surprise in chunks, the open chunk carried."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.frame import TokenGates, memory_dtype
from nestling.ops import dispatch

_DESCRIPTION = {"linear": "matrix", "mlp": "2-layer residual MLP"}


@state_class
class KeyValueState:
    """One row per sequence; as large after one token as after a million."""

    anchor: list[Tensor]  # (B, H, in, out) each: deviations from the initial weights at the last chunk border
    running: list[Tensor]  # the same after the last token
    surprise: list[Tensor]  # (B, H, in, out) each: S after the last token; empty without momentum
    count: Tensor  # (B,) int64, tokens in the open chunk


class KeyValueMemory(nn.Module):
    """A memory per head that is written with given keys and values, and its gates.

    The gates are sigmoids of the token; gradients are taken at the chunk's first state. DEVIATION: the write rate is
    eta_max eta (1 - mu) / chunk_size, so that all echoes of a chunk's writes together have rate at most eta_max:
    a linear memory with unit-norm keys then stays finite however long the sequence. DEVIATION: rates are normalized
    (ops/titans/reference.py), without which an MLP memory overflows once its matrices have grown (docs/equations.md).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: int,
        chunk_size: int,
        *,
        memory: Literal["mlp", "linear"],
        eta_max: float,
        momentum: float | None,
        half_life: float | None,
        decay_to: Literal["initial", "zero"],
    ) -> None:
        """momentum: mu of a neutral token, None = no momentum; half_life: in tokens, None = nothing is forgotten."""
        super().__init__()
        if memory not in _DESCRIPTION or decay_to not in ("initial", "zero"):
            raise ValueError(
                f'memory={memory!r}, decay_to={decay_to!r}; use "mlp" or "linear", and "initial" or "zero"'
            )
        sizes = {"expansion": expansion, "chunk_size": chunk_size, "eta_max": eta_max, "half_life": half_life}
        for name, size in sizes.items():
            if size is not None and size <= 0:
                raise ValueError(f"{name} is {size}; use a positive number")
        self.chunk_size, self.memory, self.decay_to, self.eta_max = chunk_size, memory, decay_to, eta_max
        width, hidden = dim // heads, expansion * (dim // heads)
        shapes = {"linear": [(width, width)], "mlp": [(width, hidden), (hidden, width)]}[memory]
        self.initial = nn.ParameterList(nn.Parameter(torch.randn(heads, *shape) * shape[0] ** -0.5) for shape in shapes)
        start = {"eta": 0.5}
        start |= {} if half_life is None else {"alpha": 0.5 ** (1 / half_life)}
        start |= {} if momentum is None else {"mu": momentum}
        self.gates = TokenGates(dim, heads, **start)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: KeyValueState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueState]:
        """x (B, T, D) for the gates, q, k, v (B, T, H, K) -> o (B, T, H, K) and the state after the real tokens."""
        log = self.gates(x)
        eta = log["eta"].exp() * (self.eta_max / self.chunk_size)
        if "mu" in log:
            eta = -torch.expm1(log["mu"]) * eta
        o, new = dispatch.titans(
            q,
            k,
            v,
            eta,
            log.get("alpha"),
            log.get("mu"),
            weights=tuple(w.to(memory_dtype(x)) for w in self.initial),
            state=None if state is None else (*state.anchor, *state.running, *state.surprise),
            chunk_size=self.chunk_size,
            decay_to=self.decay_to,
            normalized=True,
            count=None if state is None else state.count,
            lengths=lengths,
        )
        count = torch.zeros(len(x), dtype=torch.long, device=x.device) if state is None else state.count
        count = (count + (x.shape[1] if lengths is None else lengths.to(count))) % self.chunk_size
        n = len(self.initial)
        return o, KeyValueState(list(new[:n]), list(new[n : 2 * n]), list(new[2 * n :]), count)

    def half_life(self) -> float | None:
        """Tokens until an unwritten memory has halved its way to where it decays, at a neutral gate."""
        if "alpha" not in self.gates.names:
            return None
        return float(math.log(0.5) / self.gates.at_rest("alpha").log().mean())

    def level(self, name: str, beside: int, transfer: str = "initialisation (meta-learned)") -> Level:
        """Its box: its weights at a token are one more write than at the token before. beside: further state bytes."""
        numel = sum(w.numel() for w in self.initial)
        momentum = "mu" in self.gates.names
        return Level(
            name=name,
            memory=_DESCRIPTION[self.memory],
            objective="L2 regression",
            rule="gradient descent with momentum" if momentum else "gradient descent",
            clock="token",
            period=1,
            parameters=numel,
            half_life=self.half_life(),
            transfer=transfer,
            state_bytes=4 * numel * (3 if momentum else 2) + 8 + beside,
        )
