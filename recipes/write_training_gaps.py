"""Readers of `recipes/write_training.py` beside each other: what one reads and forgets, less what another does."""

from __future__ import annotations

from collections.abc import Sequence

from nestling.evals.statistics import Interval, paired, verdict
from recipes.cells import Cell

SEEDS = (0, 1, 2)
WEIGHT = 10.0  # of the stories against the novels
UNTRAINED, CONTROL = "untouched", "without writes"
LINES = (UNTRAINED, CONTROL)  # read at multiples of their rates


def over_texts(cells: dict[str, list[Cell]], key: str) -> list[float]:
    """The mean over the novels, by seed."""
    return [sum(c[key] for c in group) / len(group) for group in zip(*cells.values(), strict=True)]


def difference(readers: Cell, name: str, other: str) -> Cell:
    """One reader less another, by seed, means over the novels: nats on them, on the stories, and both as they count;
    and, where the other was read at multiples, nats on the novels less those on its line at equal stories."""
    mine, theirs = readers[name]["1"], readers[other]["1"]
    made: Cell = {"of": name, "less": other}
    novels, stories = ([over_texts(cells, key) for cells in (mine, theirs)] for key in ("read", "stories after"))
    both = [[a + WEIGHT * b for a, b in zip(n, s, strict=True)] for n, s in zip(novels, stories, strict=True)]
    for key, (ours, others) in {"read": novels, "stories after": stories, "worth": both}.items():
        made[key] = found(paired(ours, others))
    lines = [line(readers[other], seed) for seed in range(len(SEEDS))] if other in LINES else []
    expected = [at(points, x) for points, x in zip(lines, stories[0], strict=False)]
    known = [y for y in expected if y is not None]
    made["at equal stories"] = found(paired(novels[0], known)) if len(known) == len(SEEDS) else None
    return made


def found(gap: Interval) -> Cell:
    """An interval with what may be said of it."""
    return vars(gap) | {"verdict": verdict(gap)}


def line(kinds: Cell, seed: int) -> list[tuple[float, float]]:
    """(stories after, nats on the novels) of one reader from no writes on, by rising factor."""
    still = next(iter(kinds.values()))
    points = [(over_texts(still, "stories")[seed], over_texts(still, "frozen")[seed])]
    return points + [(over_texts(c, "stories after")[seed], over_texts(c, "read")[seed]) for c in kinds.values()]


def at(points: Sequence[tuple[float, float]], stories: float) -> float | None:
    """The least nats of a line, by straight pieces, at a loss on the stories; None where it never has it."""
    values = [
        y0 + (stories - x0) / (x1 - x0) * (y1 - y0)
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False)
        if min(x0, x1) <= stories <= max(x0, x1) and x0 != x1
    ]
    return min(values, default=None)
