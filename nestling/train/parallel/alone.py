"""A model on one process: nothing to gather, nothing to reduce. `fsdp.Sharded` is its counterpart for many."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from nestling.core.spread import Split
from nestling.core.state import Tree


class Layout(Protocol):
    """Where the parameters of a model lie, as the training step sees it.

    Attributes:
        splits: how weights are split among ranks that read the same rows, by name.
    """

    splits: dict[str, Split]

    def gathered(self) -> AbstractContextManager[None]:
        """While inside, the parameters are whole, plain tensors."""

    def in_step(self, share: float = 1.0) -> AbstractContextManager[None]:
        """While inside, all ranks read their rows with `model.loss` or `calibrate`, the same number of times.

        share: what the sum of the token losses counts in the gradient of this rank, of which the mean is taken.
        """

    def reduce_next(self, reduce: bool) -> None:
        """Whether the next backward pass reduces gradients: only the last one of a step does."""

    def clip(self, longest: float) -> float:
        """Shorten the gradient to `longest`; returns its norm before that."""

    def part(self, name: str, made: Tensor, like: Tensor) -> Tensor:
        """What is here of `made`, a whole tensor as parameter `name` is one, spread as `like` is."""

    def state_part(self, tree: Tree) -> Tree:
        """What is here of a state of this rank's rows."""


class Alone:
    """All of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.splits: dict[str, Split] = {}

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def in_step(self, share: float = 1.0) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce_next(self, reduce: bool) -> None:
        pass

    def clip(self, longest: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), longest))

    def part(self, name: str, made: Tensor, like: Tensor) -> Tensor:
        return made

    def state_part(self, tree: Tree) -> Tree:
        return tree
