"""Levels written by the CMS rule while a stream passes. The stream is one sequence, and its clock ticks per example.

Nothing but fast weights changes: the model's own weights stay as they were. A batch of examples is one segment: read
in parallel, its gradient goes to every level, and a level writes when its period is full (docs/levels.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nestling.memories.continuum import absorb, continuum_levels, current, fast_weights, initial_state, observe, reading

from .fine_tuning import Example, Loss, batches


class OneStream(nn.Module):
    """A body that sees the rows of its input one after the other as one row, so that all share one sequence's state."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D')."""
        return self.body(x.reshape(1, -1, x.shape[-1])).view(*x.shape[:-1], -1)


def as_one_stream(model: nn.Module) -> None:
    """Let the rows of a batch be parts of one stream in every level of a model, in place."""
    for level in continuum_levels(model).values():
        level.body = OneStream(level.body)


class CmsWrites:
    """The levels of a model learn a stream of examples.

    Args:
        model: holds the levels, see `as_one_stream`. loss: of examples, their mean. batch: examples of a segment.
        stored: called with every batch after its segment.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        batch: int,
        stored: Callable[[Sequence[Example]], None] | None = None,
    ) -> None:
        self.model, self.loss, self.batch, self.stored = model, loss, batch, stored
        self.levels = continuum_levels(model)
        self.state = initial_state(self.levels, 1, torch.device("cpu"))

    def learn(self, examples: Sequence[Example]) -> None:
        """One pass over the examples of a task."""
        for batch in batches(examples, self.batch):
            count = torch.tensor([len(batch)])
            with reading(current(self.levels, self.state, record=True)) as now:
                loss = self.loss(batch) * len(batch)
            seen, _ = observe(self.levels, now, loss, targets=count)
            self.state = absorb(self.levels, self.state, seen, count)
            if self.stored is not None:
                self.stored(batch)

    def reading(self) -> AbstractContextManager[Any]:
        """With the fast weights of now."""
        return fast_weights(self.model, self.state)

    def moved(self) -> dict[str, float]:
        """How far each level's weights are from where they started, relative to their length (0 if that is 0)."""
        made = {}
        for path, level in self.levels.items():
            delta = self.state[path].delta
            moved = sum(float(d.norm().square().sum()) for d in delta.values() if not d.empty)
            size = sum(float(m.weight.detach().square().sum()) for m in level.maps.values())
            made[path] = (moved / size) ** 0.5 if size else 0.0
        return made
