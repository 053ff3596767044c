"""A model on one process: nothing to gather, nothing to reduce. `parallel.Sharded` is its counterpart for many."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn


class Layout(Protocol):
    """Where the parameters of a model lie, as the training step sees it."""

    def gathered(self) -> AbstractContextManager[None]:
        """While inside, the parameters are whole, plain tensors."""

    def reduce_next(self, reduce: bool) -> None:
        """Whether the next backward pass reduces gradients: only the last one of a step does."""

    def clip(self, longest: float) -> float:
        """Shorten the gradient to `longest`; returns its norm before that."""


class Alone:
    """All of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce_next(self, reduce: bool) -> None:
        pass

    def clip(self, longest: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), longest))
