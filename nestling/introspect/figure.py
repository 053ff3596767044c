"""The boxes drawn on a logarithmic axis of periods: fast on the left, one panel for each clock."""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestling.introspect.box import Box, Boxes
from nestling.introspect.table import alike, every

WIDTH, HEIGHT, GAP = 1.9, 0.66, 0.1  # of a box, in units of the axis (one decade of periods is DECADE wide)
DECADE = 1.1
COLOURS = {"token": "#d9e8f6", "step": "#f8e6d0"}
EDGES = {"token": "#2b6ca3", "step": "#b06a1c"}


def position(period: float, last: float) -> float:
    """Where a period stands on the axis; 0 to the left of 1, inf to the right of the longest finite one, `last`."""
    if period == 0:
        return -2.2
    return DECADE * math.log10(last) + 2.2 if math.isinf(period) else DECADE * math.log10(period)


def drawn(boxes: list[Box], clock: str) -> list[tuple[Box, int]]:
    """The boxes of one clock as they are drawn: parameters that the same rule writes at the same period are one box."""
    merged: dict[tuple[object, ...], list[tuple[Box, int]]] = {}
    for box, count in alike([box for box in boxes if box.clock == clock]):
        written_alike = clock == "step" and box.parameters > 0
        key = (box.period, box.rule) if written_alike else (box.name, box.memory, box.rule, box.period)
        merged.setdefault(key, []).append((box, count))
    return [(joined([box for box, _ in group]), sum(count for _, count in group)) for group in merged.values()]


def joined(group: list[Box]) -> Box:
    """One box for several, named after the kinds of their memories."""
    if len(group) == 1:
        return group[0]
    kinds = list(dict.fromkeys(box.memory.split(" ")[0] for box in group))
    return replace(
        group[0], name="parameters", memory=", ".join(kinds), parameters=sum(box.parameters for box in group)
    )


def place(boxes: list[tuple[Box, int]], last: float) -> list[tuple[float, int]]:
    """Centre and row of each box: the lowest row in which it overlaps no other."""
    taken: list[tuple[float, int]] = []
    for box, _ in boxes:
        x = position(box.period, last)
        row = next(r for r in range(len(boxes) + 1) if all(r != s or abs(x - y) >= WIDTH + GAP for y, s in taken))
        taken.append((x, row))
    return taken


def draw(boxes: Boxes, path: Path) -> Path:
    """Draw into `path` and return it. Raises ImportError naming the extra if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib, which is not installed; pip install 'nestling[plot]'") from None
    clocks = [clock for clock in ("token", "step") if any(box.clock == clock for box in boxes)]
    panels = [(clock, drawn(list(boxes), clock)) for clock in clocks]
    last = max((box.period for box in boxes if math.isfinite(box.period)), default=1.0) or 1.0
    places = [place(panel, last) for _, panel in panels]
    rows = [1 + max(row for _, row in at) for at in places]
    wide = position(math.inf, last) - position(0, last) + WIDTH
    figure = Figure(figsize=(max(7.0, 1.15 * wide), 0.85 * sum(rows) + 1.1 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[n + 0.6 for n in rows])[:, 0]
    for axis, (clock, panel), at in zip(axes, panels, places, strict=True):
        draw_panel(axis, clock, panel, at, last)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_panel(axis: Any, clock: str, panel: list[tuple[Box, int]], at: list[tuple[float, int]], last: float) -> None:
    """One clock: its boxes, and ticks at the periods that occur."""
    from matplotlib.patches import FancyBboxPatch

    for (box, count), (x, row) in zip(panel, at, strict=True):
        y = row * (HEIGHT + GAP)
        axis.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2, y),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=COLOURS[clock],
                edgecolor=EDGES[clock],
            )  # fmt: skip
        )
        axis.text(x, y + HEIGHT / 2, label(box, count), ha="center", va="center", fontsize=6.5, linespacing=1.15)
    ticks = {position(box.period, last): every(box) for box, _ in panel}
    axis.set_xticks(list(ticks), [textwrap.fill(text, 12) for text in ticks.values()], fontsize=7)
    axis.set_xlim(position(0, last) - WIDTH / 2 - GAP, position(math.inf, last) + WIDTH / 2 + GAP)
    axis.set_ylim(-GAP, (1 + max(row for _, row in at)) * (HEIGHT + GAP))
    axis.set_yticks([])
    axis.spines[["left", "right", "top"]].set_visible(False)
    writes = "state, one per sequence" if clock == "token" else "parameters and what the optimizer keeps"
    axis.set_title(f"{clock} clock: writes {writes}", loc="left", fontsize=9)
    axis.set_xlabel("period between writes (fast → slow)", fontsize=8)


def label(box: Box, count: int) -> str:
    """What stands in a box: name, memory, rule, size."""
    name = f"{box.name} ({count})" if count > 1 else box.name
    size = f"{box.parameters:,} parameters" if box.parameters else ""
    lines = [textwrap.shorten(text, 34, placeholder="…") for text in (name, box.memory, box.rule, size) if text]
    return "\n".join(lines)
