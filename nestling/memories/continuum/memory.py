"""The Continuum Memory System: MLP blocks with a period each, in a chain, nested, or side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.level import Level
from ...core.spread import Split
from .learn import FastState, continuum_levels, current
from .level import ContinuumLevel
from .linear import Bend, FastLinear, ahead, reading
from .rules import InnerRule

Bends = list[dict[str, Bend]]  # of a stack: by level, and there by map


class GatedMLP(nn.Module):
    """Pre-norm SwiGLU: x -> W_down (silu(g) * u), [g, u] = W_up norm(x). No biases: they are never worth writing."""

    def __init__(self, dim: int, hidden: int, *, metric: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.up = FastLinear(dim, 2 * hidden, metric=metric)
        self.down = FastLinear(hidden, dim, metric=metric)

    def forward(self, x: Tensor, up: Bend | None = None, down: Bend | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). up, down: what the reading says of these maps, as in `FastLinear`."""
        gate, value = self.up(self.norm(x), up).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value, down)


class ContinuumStack(nn.Module, ABC):
    """Levels of a CMS, fast to slow. Abstract: the finals say how the levels are joined.

    Args:
        dim: width of the stream.
        periods: tokens between two writes, fast to slow; math.inf = frozen.
        hidden: hidden width of all levels together; one MLP of that width has the same parameters.
        rules: one `InnerRule`, or one per level; None = the default rule.
        slow_first: apply the slow levels first (the index order of eq. (70)) instead of fast first (its figure).
    Raises ValueError for unordered periods, a period not a multiple of the shortest, or too small a width.
    """

    def __init__(
        self,
        dim: int,
        periods: Sequence[float],
        *,
        hidden: int | None = None,
        rules: InnerRule | Sequence[InnerRule] | None = None,
        slow_first: bool = False,
    ) -> None:
        super().__init__()
        check_periods(periods)
        hidden = 8 * dim // 3 if hidden is None else hidden
        widths = [hidden // len(periods) + (i < hidden % len(periods)) for i in range(len(periods))]
        if min(widths) < 1:
            raise ValueError(f"hidden={hidden} is too small for {len(periods)} periods; use at least {len(periods)}")
        rules = InnerRule() if rules is None else rules
        rules = [rules] * len(periods) if isinstance(rules, InnerRule) else list(rules)
        if len(rules) != len(periods):
            raise ValueError(f"{len(rules)} rules for {len(periods)} periods; give one rule, or one per period")
        self.slow_first = slow_first
        self.stack = nn.ModuleList(
            ContinuumLevel(
                GatedMLP(dim, width, metric=rule.kappa > 0 and period != float("inf")),
                period=period,
                rule=rule,
                name=f"cms {period:g}",
            )
            for period, width, rule in zip(periods, widths, rules, strict=True)
        )

    @abstractmethod
    def join(self, x: Tensor, bends: Bends | None = None) -> Tensor:
        """The output of the whole stack for x (B, T, D), with the `bends` of its maps if these were asked `ahead`."""

    @contextmanager
    def ahead(self, rows: int, tokens: int) -> Iterator[Bends]:
        """What the reading around says of the maps of each level, for `join`; frozen levels are not asked."""
        levels: list[ContinuumLevel] = list(self.stack)  # type: ignore[arg-type]
        maps = [m for level in levels if level.writable for m in level.maps.values()]
        with ahead(maps, rows, tokens) as said:
            bends = iter(said)
            yield [{name: next(bends) if level.writable else Bend() for name in level.maps} for level in levels]

    def forward(
        self, x: Tensor, state: FastState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, FastState | None]:
        """Read. The write needs the task loss: `nestling.learn`.

        Args:
            x: (B, T, D). state: fast weights of this layer alone, from `learn`; None = those of the reading around it.
        """
        if state is None:
            return self.join(x), None
        with reading(current(continuum_levels(self), state)):
            return self.join(x), state

    def splits(self, parts: int) -> dict[str, Split]:
        """Every part has its share of each level's hidden units, and what these have written.

        Raises ValueError if they do not divide, or if the rule of a level joins them.
        """
        widths: list[int] = [level.body.down.in_features for level in self.stack]  # type: ignore[union-attr, misc]
        if any(width % parts for width in widths):
            unit = len(widths) * parts
            raise ValueError(
                f"hidden={sum(widths)} does not divide into {len(widths)} levels times {parts} ranks; "
                f"use a multiple of {unit}, for example {max(1, round(sum(widths) / unit)) * unit}"
            )
        for level in self.stack:
            level.check_split()  # type: ignore[operator]
        down, up = Split(1), Split(0, blocks=2)  # gate and up lie side by side
        return {f"stack.{i}.body.{name}": s for i in range(len(widths)) for name, s in (("up", up), ("down", down))}

    def levels(self) -> list[Level]:
        """One box per level, fast to slow."""
        return [box for level in self.stack for box in level.levels()]  # type: ignore[operator]


class ContinuumMemory(ContinuumStack):
    """Sequential CMS, eqs. (70) and (73): x <- x + MLP_l(norm x), level after level."""

    def join(self, x: Tensor, bends: Bends | None = None) -> Tensor:
        levels = list(zip(self.stack, bends or [{}] * len(self.stack), strict=True))
        for level, own in reversed(levels) if self.slow_first else levels:
            x = x + level(x, **own)
        return x


class NestedContinuumMemory(ContinuumMemory):
    """Nested CMS, eq. (72): when a level writes, the next faster one starts again from its initial state."""

    def __init__(
        self, dim: int, periods: Sequence[float], *, rules: InnerRule | Sequence[InnerRule] | None = None, **more: Any
    ) -> None:
        rules = InnerRule() if rules is None else rules
        each = [rules] * len(periods) if isinstance(rules, InnerRule) else list(rules)
        super().__init__(dim, periods, rules=[replace(rule, reset="outer") for rule in each], **more)


class IndependentContinuumMemory(ContinuumStack):
    """Independent CMS, eq. (74): x + sum_l a_l MLP_l(norm x) with learned weights a."""

    def __init__(self, dim: int, periods: Sequence[float], **more: Any) -> None:
        super().__init__(dim, periods, **more)
        self.weights = nn.Parameter(torch.ones(len(periods)))

    def join(self, x: Tensor, bends: Bends | None = None) -> Tensor:
        y = torch.zeros_like(x)
        for a, level, own in zip(self.weights, self.stack, bends or [{}] * len(self.stack), strict=True):
            y = y + a * level(x, **own)
        return x + y


def check_periods(periods: Sequence[float]) -> None:
    """Periods run fast to slow and every finite one is a multiple of the shortest."""
    if not periods:
        raise ValueError("periods is empty; give at least one, e.g. periods=(float('inf'),) for a frozen MLP")
    if list(periods) != sorted(periods):
        raise ValueError(f"periods={tuple(periods)} must run from fast to slow, e.g. {tuple(sorted(periods))}")
    if not min(periods) >= 1:
        raise ValueError(f"periods={tuple(periods)} must be whole numbers of tokens >= 1, or inf for a frozen level")
    for period in periods:
        if period != float("inf") and period % periods[0]:
            near = max(1, round(period / periods[0])) * periods[0]
            raise ValueError(
                f"period {period:g} is not a multiple of the shortest period {periods[0]:g}; use e.g. {near:g}"
            )
