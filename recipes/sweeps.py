"""Rates chosen by one number each, on a grid that grows until the best is inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recipes.optimizer_zoo import FACTOR, Entry

FIRST = (-2, -1, 0, 1)  # powers of FACTOR that the default rate is multiplied by, before the grid grows
LOWEST, HIGHEST = -8, 4


def climb(
    entry: Entry, score: Callable[[float], float], first: Sequence[int] = FIRST
) -> tuple[float, dict[str, float]]:
    """The rate with the largest score, and all scores by rate. A tie goes to the lower rate; -inf is for divergence."""
    found: dict[int, float] = {}
    todo = list(first)
    while todo:
        found |= {power: score(rate(entry, power)) for power in todo}
        best = max(sorted(found), key=found.__getitem__)
        todo = [power for power in (best - 1, best + 1) if power not in found and LOWEST <= power <= HIGHEST]
    return rate(entry, best), {f"{rate(entry, power):.3g}": found[power] for power in sorted(found)}


def rate(entry: Entry, power: int) -> float:
    """A rate of the grid."""
    return entry.default * FACTOR**power
