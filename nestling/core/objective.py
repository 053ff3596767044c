"""Inner objectives: what one write of an associative memory descends, with the gradient in closed form.

An objective compares what the memory returns for a key with the value it should return. It never sees the memory
itself, so every objective works with every memory. Sources: paper (9), (16), (34), (50), (65) and the L_p row of
the table in section 4; docs/equations.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Objective(ABC):
    """L(prediction; value), summed over the last axis."""

    name: str

    @abstractmethod
    def loss(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        """The loss of each pair: prediction (..., V), value (..., V) -> (...)."""

    @abstractmethod
    def gradient(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        """d loss / d prediction, (..., V): the local surprise signal."""


@dataclass(frozen=True)
class DotProduct(Objective):
    """-<M(k), v>: Hebbian; a gradient step adds v k^T and erases nothing."""

    name = "dot product"

    def loss(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        return -(prediction * _required(value, self)).sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        return -_required(value, self).expand_as(prediction)


@dataclass(frozen=True)
class L2Regression(Objective):
    """1/2 |M(k) - v|^2: a gradient step replaces what was stored at k. The half drops the factor 2 of (65)."""

    name = "L2 regression"

    def loss(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        return 0.5 * (prediction - _required(value, self)).square().sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        return prediction - _required(value, self)


@dataclass(frozen=True)
class RobustLp(Objective):
    """sum_i ((M(k) - v)_i^2 + smoothing)^(p/2) / p: outliers pull less than under L2 for p < 2.

    p = 2 and smoothing = 0 is L2Regression. The smoothing keeps the gradient finite at zero error for p < 2.
    """

    p: float = 1.0
    smoothing: float = 1e-6
    name = "robust L_p"

    def __post_init__(self) -> None:
        if self.p < 1 or self.smoothing < 0 or (self.p < 2 and self.smoothing == 0):
            raise ValueError(
                f"p={self.p}, smoothing={self.smoothing}: need p >= 1, and smoothing > 0 below p = 2; use 1e-6"
            )

    def loss(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        error = prediction - _required(value, self)
        return (error.square() + self.smoothing).pow(self.p / 2).sum(-1) / self.p

    def gradient(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        error = prediction - _required(value, self)
        return error * (error.square() + self.smoothing).pow(self.p / 2 - 1)


@dataclass(frozen=True)
class ValueLess(Objective):
    """<M(k), 1>: keys are gradients, nothing is to be returned, a descent step subtracts the key. Momentum, (50)."""

    name = "value-less dot product"

    def loss(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        _forbidden(value, self)
        return prediction.sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor | None) -> Tensor:
        _forbidden(value, self)
        return torch.ones_like(prediction)


def _required(value: Tensor | None, objective: Objective) -> Tensor:
    if value is None:
        raise ValueError(f"value is None, but {objective.name} needs one; pass values, or use ValueLess()")
    return value


def _forbidden(value: Tensor | None, objective: Objective) -> None:
    if value is not None:
        raise ValueError(f"value has shape {tuple(value.shape)}, but {objective.name} has none; pass None")
