"""Elastic weight consolidation (Kirkpatrick et al. 2017), in its online form: one anchor, one running sum of Fishers.

    penalty = strength / 2 * sum_i F_i (theta_i - anchor_i)^2

F is the diagonal of the empirical Fisher, the mean over examples of the squared gradient of one example's loss, summed
over the tasks so far; the anchor is the weights after the last task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .fine_tuning import Example, Loss


class ElasticWeights:
    """The penalty, and what it is made of.

    Args:
        loss: of examples. parameters: what is held. strength: the factor. examples: of a task that F is taken from.
    """

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter], *, strength: float, examples: int) -> None:
        self.loss, self.strength, self.examples = loss, strength, examples
        self.parameters = [p for p in parameters if p.requires_grad]
        self.anchor: list[Tensor] = []
        self.fisher = [torch.zeros_like(p) for p in self.parameters]

    def penalty(self) -> Tensor:
        """Zero before the first task is over."""
        if not self.anchor:
            return torch.zeros(())
        parts = [
            (f * (p - a).square()).sum() for p, a, f in zip(self.parameters, self.anchor, self.fisher, strict=True)
        ]
        return self.strength / 2 * torch.stack(parts).sum()

    def consolidate(self, examples: Sequence[Example]) -> None:
        """Add the Fisher of a task at the weights of now, and anchor there; evenly spaced examples stand for it."""
        every = max(1, len(examples) // self.examples)
        chosen = examples[::every][: self.examples]
        for example in chosen:
            grads = torch.autograd.grad(self.loss([example]), self.parameters, allow_unused=True)
            for fisher, grad in zip(self.fisher, grads, strict=True):
                if grad is not None:
                    fisher += grad.square() / len(chosen)
        self.anchor = [p.detach().clone() for p in self.parameters]
