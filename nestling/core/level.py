"""Levels: how often a memory is written, and on which clock.

Two clocks never mix. The **token clock** ticks once per token inside a sequence, also after deployment; what it
writes is *state*, one per sequence. The **step clock** ticks once per optimizer step; what it writes is
*parameters*, shared by all sequences. The token clock is the faster one, whatever the periods.

A level is named and carries its period; it has no integer number, because the paper numbers levels in both
directions (docs/levels.md). Source: paper Definition 2 and 3; docs/equations.md rows "Def. 2" and (19).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

Clock = Literal["token", "step"]
_CLOCK_ORDER = {"token": 0, "step": 1}


@dataclass(frozen=True, kw_only=True)
class Level:
    """One box: an associative memory, its objective, its update rule and its period."""

    name: str  # where it lives, e.g. "blocks.0.mixer.memory"
    memory: str  # e.g. "softmax attention", "2-layer MLP"
    objective: str  # what a write descends, e.g. "L2 regression", "next-token loss"
    rule: str  # e.g. "gradient descent with momentum", "DGD"
    clock: Clock
    period: float  # ticks between writes; 0 = re-solved at every read (frequency infinity), inf = never written
    parameters: int  # slow parameters it owns
    half_life: float | None = None  # tokens until an undisturbed memory has halved; None = it does not decay
    transfer: str = "none"  # knowledge transfer to its initial state, e.g. "initialisation (meta-learned)"
    state_bytes: int | None = None  # upper bound of its state per row; None = unbounded

    def __post_init__(self) -> None:
        if self.clock not in _CLOCK_ORDER:
            raise ValueError(f'clock of level "{self.name}" is {self.clock!r}; use "token" or "step"')
        if math.isnan(self.period) or self.period < 0:
            raise ValueError(
                f'period of level "{self.name}" is {self.period}, not >= 0; use ticks between writes, 0 or inf'
            )

    @property
    def frequency(self) -> float:
        """Writes per tick of its clock."""
        return math.inf if self.period == 0 else 1 / self.period

    def due(self, count: int) -> bool:
        """Whether it writes once `count` ticks of its clock have passed in all."""
        if self.period == 0:
            return True
        return count > 0 and math.isfinite(self.period) and count % self.period == 0

    def writes(self, count: int) -> int:
        """How many writes have happened after `count` ticks; a level with period 0 keeps nothing to count."""
        return 0 if self.period == 0 else int(count // self.period)

    def is_faster_than(self, other: Level) -> bool:
        """The strict order of Definition 2 by frequency; token clock before step clock."""
        return self._rank() < other._rank()

    def _rank(self) -> tuple[int, float]:
        return _CLOCK_ORDER[self.clock], self.period


class Levels(Sequence[Level]):
    """Levels ordered fast to slow; among equal frequencies the given order stays."""

    def __init__(self, levels: Iterable[Level]) -> None:
        self._levels = tuple(sorted(levels, key=Level._rank))

    @overload
    def __getitem__(self, index: int) -> Level: ...
    @overload
    def __getitem__(self, index: slice) -> Levels: ...
    def __getitem__(self, index: int | slice) -> Level | Levels:
        return Levels(self._levels[index]) if isinstance(index, slice) else self._levels[index]

    def __len__(self) -> int:
        return len(self._levels)

    def __iter__(self) -> Iterator[Level]:
        return iter(self._levels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Levels) and self._levels == other._levels

    def __hash__(self) -> int:
        return hash(self._levels)

    def __repr__(self) -> str:
        return f"Levels({list(self._levels)})"

    def on(self, clock: Clock) -> Levels:
        """Only the levels of one clock."""
        return Levels(level for level in self if level.clock == clock)

    def due(self, count: int, clock: Clock = "token") -> Levels:
        """The levels of `clock` that write once `count` ticks have passed."""
        return Levels(level for level in self.on(clock) if level.due(count))

    def by_frequency(self) -> list[Levels]:
        """Boxes of equal clock and period share a level (e.g. Adam's two moments); fast to slow."""
        groups: dict[tuple[int, float], list[Level]] = {}
        for level in self:
            groups.setdefault(level._rank(), []).append(level)
        return [Levels(group) for group in groups.values()]
