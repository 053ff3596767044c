"""Titans with attention: the memory as a gate on it (MAG) and as a layer before it (MAL), [Titans] sections 4.2, 4.3.

Both attend over a sliding window behind persistent memory: a few learned tokens that every query sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.attention import Attention
from nestling.memories.frame import static_level
from nestling.memories.titans import TitansMemory, TitansState


@state_class
class HybridState:
    """One row per sequence."""

    attention: Any  # AttentionState, or OpenCache while tokens are decoded one by one
    memory: TitansState


class Hybrid(nn.Module):
    """What MAG and MAL share: their parts and boxes. `y, state = layer(x, state=None, lengths=None)`.

    DEVIATION: the persistent tokens are seen by attention alone; before the memory stand its learned initial weights.
    """

    gated: bool  # whether the memory gates its own output

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: int = 2,
        chunk_size: int = 16,
        *,
        window: int | None = 256,
        persistent: int = 4,
    ) -> None:
        """expansion, chunk_size: of `TitansMemory`; window: of attention; persistent: learned tokens before it."""
        super().__init__()
        self.attention = Attention(dim, heads, window=window, persistent=persistent)
        self.memory = TitansMemory(dim, heads, expansion, chunk_size, gated=self.gated)
        self.norms(dim)

    def norms(self, dim: int) -> None:
        """The norms of the form."""
        raise NotImplementedError

    def keys_per_query(self, context: int) -> int:
        """Keys that a query is compared with."""
        return self.attention.keys_per_query(context)

    def levels(self) -> list[Level]:
        """Attention, the memory, and the projections around them."""
        (attention,), (memory, _) = self.attention.levels(), self.memory.levels()
        return [attention, memory, static_level(self, attention.parameters + memory.parameters)]


class MemoryAsGate(Hybrid):
    """y = norm(attention(x)) * sigmoid(norm(memory(x))): a branch for what is near and one for what was read."""

    gated = False

    def norms(self, dim: int) -> None:
        self.norm_out, self.norm_gate = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))

    def forward(
        self, x: Tensor, state: HybridState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, HybridState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all)."""
        m, memory = self.memory(x, None if state is None else state.memory, lengths)
        y, attention = self.attention(x, None if state is None else state.attention, lengths)
        y, m = y.to(x.dtype), m.to(x.dtype)  # autocast leaves them narrower
        return self.norm_out(y) * torch.sigmoid(self.norm_gate(m)), HybridState(attention, memory)


class MemoryAsLayer(Hybrid):
    """h = memory(x), y = h + attention(norm(x + h)): attention reads what the memory makes of the past.

    DEVIATION: both have residual paths, which the paper's equations leave out.
    """

    gated = True

    def norms(self, dim: int) -> None:
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(
        self, x: Tensor, state: HybridState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, HybridState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all)."""
        h, memory = self.memory(x, None if state is None else state.memory, lengths)
        y, attention = self.attention(self.norm(x + h), None if state is None else state.attention, lengths)
        return h + y, HybridState(attention, memory)
