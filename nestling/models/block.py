"""Block: a sequence memory and a continuum memory, pre-norm residual; the only place where the two meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.level import Level
from ..core.spread import Split
from ..memories.continuum import (
    ContinuumMemory,
    ContinuumStack,
    IndependentContinuumMemory,
    NestedContinuumMemory,
    checkpointed,
)
from .config import ModelConfig

STACKS: dict[str, type[ContinuumStack]] = {
    "sequential": ContinuumMemory,
    "nested": NestedContinuumMemory,
    "independent": IndependentContinuumMemory,
}


Reads = Callable[["Block", Tensor, Any, Tensor | None], tuple[Tensor, Any]]


class Block(nn.Module):
    """x <- x + mixer(norm x), then the CMS levels, each with its own norm and residual path.

    Args:
        mixer: a token memory, `y, state = mixer(x, state, lengths)`.
        channel: a continuum stack.
    Attributes:
        recompute: keep no activations of the block for the backward pass, which computes them again.
        reads: how it computes: `read`, or graphs of it that all blocks share (compiled.py).
    """

    def __init__(self, dim: int, mixer: nn.Module, channel: ContinuumStack) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mixer: Any = mixer
        self.channel = channel
        self.recompute = False
        self.reads: Reads = read

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """x (B, T, D) -> (B, T, D) and the mixer's state."""
        if self.recompute and torch.is_grad_enabled():
            return checkpointed(self.reads, self, x, state, lengths)
        return self.reads(self, x, state, lengths)

    def splits(self, parts: int) -> dict[str, Split]:
        """How the maps of the block may be split among ranks; a mixer that does not say stays whole."""
        mixer = self.mixer.splits(parts) if hasattr(self.mixer, "splits") else {}
        found = {f"mixer.{name}": split for name, split in mixer.items()}
        return found | {f"channel.{name}": split for name, split in self.channel.splits(parts).items()}

    def keys_per_query(self, context: int) -> int:
        """Keys that attention, if there is any, compares a query with when `context` tokens were read."""
        return self.mixer.keys_per_query(context) if hasattr(self.mixer, "keys_per_query") else 0

    def levels(self) -> list[Level]:
        """The boxes of the block. Where levels write, a state holds the mixer twice: also as the open segment began,
        with the tokens of that segment."""
        boxes, channel = self.mixer.levels(), self.channel.levels()
        periods = [box.period for box in channel if math.isfinite(box.period)]
        if not periods:
            return [*boxes, *channel]
        segment = 16 * int(min(periods)) + 32
        twice = [box if box.state_bytes is None else replace(box, state_bytes=2 * box.state_bytes) for box in boxes]
        return [*twice, replace(channel[0], state_bytes=(channel[0].state_bytes or 0) + segment), *channel[1:]]


def read(block: Block, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
    """What a block computes: its mixer, then its channel."""
    y, state = block.mixer(block.norm(x), state, lengths)
    return block.channel(x + y)[0], state


def continuum_of(config: ModelConfig) -> ContinuumStack:
    """The CMS of one block."""
    return STACKS[config.continuum](config.dim, config.periods, hidden=config.width, rules=config.rules())
