"""Boxes as text: one row per box, boxes of like blocks together in one, columns wrapped to the terminal."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import textwrap
from collections.abc import Sequence

from nestling.introspect.box import Box

HEADINGS = ("box", "memory", "objective", "rule", "written every", "parameters", "half-life", "state", "transfer")
NARROWEST = 9  # a column
NARROW, WIDE = 100, 200  # the table


def alike(boxes: Sequence[Box]) -> list[tuple[Box, int]]:
    """Boxes that differ only in a number within their name, as one box and how many they were."""
    groups: dict[tuple[object, ...], list[Box]] = {}
    for box in boxes:
        rest = tuple(v for k, v in dataclasses.asdict(box).items() if k != "name")
        groups.setdefault((re.sub(r"\b\d+\b", "*", box.name), *rest), []).append(box)
    return [(together(group), len(group)) for group in groups.values()]


def together(group: list[Box]) -> Box:
    """One box for several alike: a star for the numbers in which names differ, sums of what they own and write."""
    first, count = group[0], len(group)
    if count == 1:
        return first
    sums = {key: count * getattr(first, key) for key in ("parameters", "tensors", "elements")}
    size = None if first.state_bytes is None else count * first.state_bytes
    parts = zip(*(re.split(r"\b(\d+)\b", box.name) for box in group), strict=True)
    name = "".join(same[0] if len(set(same)) == 1 else "*" for same in parts)
    return dataclasses.replace(first, name=name, state_bytes=size, **sums)


def render(boxes: Sequence[Box], width: int | None = None) -> str:
    """The table, `width` characters wide at most (default: the terminal, 160 where there is none, at least 100)."""
    width = width or max(NARROW, min(shutil.get_terminal_size((160, 50)).columns, WIDE))
    rows = [list(HEADINGS), *(cells(box, count) for box, count in alike(boxes))]
    widths = fit([max(len(row[i]) for row in rows) for i in range(len(HEADINGS))], width)
    lines = [line for row in rows for line in wrapped(row, widths)]
    rule_at = len(wrapped(rows[0], widths))
    lines.insert(rule_at, "  ".join("-" * w for w in widths))
    total = sum(box.parameters for box in boxes)
    return "\n".join([*lines, f"{len(boxes)} boxes, {total:,} parameters"])


def cells(box: Box, count: int) -> list[str]:
    """The text of one row."""
    name = f"{box.name} ({count} of them)" if count > 1 else box.name
    return [
        name, box.memory, box.objective, box.rule, every(box), f"{box.parameters:,}" if box.parameters else "-",
        half_life(box), state(box), box.transfer,
    ]  # fmt: skip


def every(box: Box) -> str:
    """How often it is written, e.g. "512 tokens", "1 step", "never", "read: ∞"."""
    if box.period == 0:
        return f"each read (∞ per {box.clock})"
    if math.isinf(box.period):
        return "never"
    return f"{box.period:,.0f} {box.clock}{'s' if box.period != 1 else ''}"


def half_life(box: Box) -> str:
    """Ticks until it has halved, e.g. "6.6 steps"; "-" if it does not decay."""
    if box.half_life is None:
        return "-"
    return f"{box.half_life:,.1f} {box.clock}s" if box.half_life < 100 else f"{box.half_life:,.0f} {box.clock}s"


def state(box: Box) -> str:
    """Size of what is written: per row on the token clock, in all on the step clock."""
    if box.state_bytes is None:
        return "grows" if box.clock == "token" and math.isfinite(box.period) else "-"
    size, unit = float(box.state_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" + (" a row" if box.clock == "token" else "")


def fit(widths: list[int], width: int) -> list[int]:
    """Take from the widest column until the sum, with two blanks between columns, is at most `width`."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def wrapped(row: list[str], widths: list[int]) -> list[str]:
    """The lines of one row."""
    columns = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
    height = max(map(len, columns))
    return [
        "  ".join((col[i] if i < len(col) else "").ljust(w) for col, w in zip(columns, widths, strict=True)).rstrip()
        for i in range(height)
    ]
