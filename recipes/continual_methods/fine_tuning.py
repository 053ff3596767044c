"""Fine-tuning on a stream: every example once, in the order in which it comes, Adam at a constant rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Example = Any
Loss = Callable[[Sequence[Example]], Tensor]  # mean over the examples

CLIP = 1.0


class Method(Protocol):
    """What learns one task after the other."""

    def learn(self, examples: Sequence[Example]) -> None: ...
    def reading(self) -> AbstractContextManager[Any]: ...


def batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Consecutive pieces."""
    return [examples[i : i + size] for i in range(0, len(examples), size)]


class FineTuning:
    """Adam on the loss of each batch.

    Args:
        loss: of examples. parameters: what is trained. lr: rate of Adam. batch: examples of a step.
        penalty: added to the loss. mixed: gives earlier examples that a batch is mixed with.
        stored, ended: called with every batch after its step, and with every task after its last.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        batch: int,
        penalty: Callable[[], Tensor] | None = None,
        mixed: Callable[[Sequence[Example]], Sequence[Example]] | None = None,
        stored: Callable[[Sequence[Example]], None] | None = None,
        ended: Callable[[Sequence[Example]], None] | None = None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        self.loss, self.batch, self.penalty, self.mixed = loss, batch, penalty, mixed
        self.stored, self.ended = stored, ended

    def learn(self, examples: Sequence[Example]) -> None:
        """One pass over the examples of a task."""
        for batch in batches(examples, self.batch):
            self.step([*batch, *(self.mixed(batch) if self.mixed is not None else ())])
            if self.stored is not None:
                self.stored(batch)
        if self.ended is not None:
            self.ended(examples)

    def step(self, examples: Sequence[Example]) -> None:
        loss = self.loss(examples)
        if self.penalty is not None:
            loss = loss + self.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()

    def reading(self) -> AbstractContextManager[Any]:
        """Nothing to prepare: what was learned is in the weights."""
        return nullcontext()
