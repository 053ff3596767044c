"""Inner rules: how a level turns the gradient of its last period into a write.

A rule has a direction (plain gradient, momentum, Adam-like), a length, and a retention of what was written before
(erase, decay). Every choice is one field of `InnerRule`; levels.md says which of them was measured to help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from nestling.ops import dispatch

Moments = dict[str, Tensor]


class Direction(Protocol):
    """From a gradient (B, O, I) and the moments kept between writes to the direction of the write."""

    def __call__(self, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]: ...


@dataclass(frozen=True)
class Momentum:
    """m <- beta m + g; write along m. The value-less linear memory of gradients, eq. (33)."""

    beta: float = 0.9

    def __call__(self, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        m = gradient if "m" not in moments else self.beta * moments["m"] + gradient
        return m, {"m": m}


@dataclass(frozen=True)
class AdamLike:
    """m and v are means of g and g^2 with bias correction; write along m / (sqrt(v) + eps)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __call__(self, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        zero = torch.zeros_like(gradient)
        count = moments.get("count", gradient.new_zeros(len(gradient))) + 1
        m = torch.lerp(gradient, moments.get("m", zero), self.beta1)
        v = torch.lerp(gradient.square(), moments.get("v", zero), self.beta2)
        c1, c2 = ((1 - beta**count).view(-1, 1, 1) for beta in (self.beta1, self.beta2))
        return (m / c1) / ((v / c2).sqrt() + self.eps), {"m": m, "v": v, "count": count}


@dataclass(frozen=True)
class MuonLike:
    """m <- beta m + g; write along NewtonSchulz(m): the momentum's singular vectors, all at about equal length, (52).

    A direction has length sqrt(rank) whatever the surprise, so with `relative` every write is rate * |W| long.
    """

    beta: float = 0.9
    steps: int = 5

    def __call__(self, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        m = gradient if "m" not in moments else self.beta * moments["m"] + gradient
        return dispatch.newton_schulz(m, self.steps), {"m": m}


DIRECTIONS: dict[str, Direction | None] = {
    "sgd": None,
    "momentum": Momentum(),
    "adam": AdamLike(),
    "muon": MuonLike(),
}
Reset = Literal["never", "document", "outer"]


@dataclass(frozen=True, kw_only=True)
class InnerRule:
    """How a level writes. With W the level's weight, D what was written, g the mean gradient of one period:

        D <- (1 - decay) D (I - erase K) - rate * length * direction(g) (I + kappa C)^-1

    where K is the mean of x x^T / |x|^2 over the period's inputs and C the covariance of the inputs on old text.

    Attributes:
        rate: length of a write; with `relative` in units of the weights, else the learning rate of the direction.
        direction: None for the gradient itself, or `Momentum`, `AdamLike`, `MuonLike`.
        relative: a period as surprising as training text moves the weights by rate * |W|, and one twice as surprising
            by twice that, so that rates carry over between models. Before calibration every write has that length.
        bound: no write is longer than bound * |W|.
        erase: strength in [0, 1] of the delta-rule erase of D along the keys of the period.
        decay: part of D that a write forgets; the weights go back to their initial state.
        kappa: strength of the old-key metric; 0 = none.
        online: also accumulate C from what this sequence reads (the slowest level of the stack keeps it).
        learned: the rate is a parameter (in log space), trained by the outer loss.
        reset: when the fast weights go back to the initial state: never, at a document border, or whenever the next
            slower level writes ("outer", the nested variant).
    Raises ValueError for a value out of its range.
    """

    rate: float = 0.01
    direction: Direction | None = None
    relative: bool = True
    bound: float = 0.1
    erase: float = 0.0
    decay: float = 0.0
    kappa: float = 100.0
    online: bool = False
    learned: bool = False
    reset: Reset = "never"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rate", 0, None),
            ("bound", 0, None),
            ("erase", 0, 1),
            ("decay", 0, 1),
            ("kappa", 0, None),
        ):
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                top = "infinity" if high is None else high
                raise ValueError(f"inner rule: {name}={value} is outside {low} .. {top}; choose a value inside")
        if self.learned and self.rate == 0:
            raise ValueError("inner rule: a learned rate lives in log space and cannot start at rate=0; use e.g. 1e-4")

    @property
    def static(self) -> bool:
        """True if the rule never changes anything."""
        return self.rate == 0 and not self.learned
