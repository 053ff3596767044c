"""Rows of measurements as a table, for the terminal or as markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def number(key: str, digits: int = 3, scale: float = 1.0) -> Callable[[Row], str]:
    """A field to so many significant digits, with thousands set apart; "-" where a row lacks it."""

    def shown(row: Row) -> str:
        value = row.get(key)
        if value is None or value != value:
            return "-"
        value = value * scale
        if abs(value) >= 10 ** (digits - 1):
            return f"{round(value, digits - len(str(int(abs(value))))):,.0f}"
        return f"{value:.{digits}g}"

    return shown


def word(key: str) -> Callable[[Row], str]:
    """A field as it is."""
    return lambda row: str(row.get(key, "-"))


def _pass(row: Row) -> str:
    return "-" if "training" not in row else "forward + backward" if row["training"] else "forward"


def _writes(row: Row) -> str:
    return "on" if row["learn"] else "off"


SPEED: list[Column] = [
    ("tokens/s", number("tokens_per_second")),
    ("ratio", number("ratio")),
    ("GFLOP/s", number("gflops_per_second")),
    ("floor / time", number("floor", 2)),
    ("peak MB", number("peak_bytes", scale=1e-6)),
    ("gate", word("gate")),
]
COLUMNS: dict[str, list[Column]] = {
    "ops": [("op", word("name")), ("form", word("form")), ("pass", _pass), *SPEED],
    "layers": [("layer", word("name")), ("pass", _pass), *SPEED],
    "models": [("model", word("name")), ("parameters", number("parameters")), *SPEED],
    "readings": [("model", word("name")), *SPEED[:4]],
    "length": [
        ("what", word("name")),
        ("tokens", number("length", 6)),
        ("seconds", number("seconds")),
        ("tokens/s", number("tokens_per_second")),
        ("peak MB", number("peak_bytes", scale=1e-6)),
    ],
    "decode": [
        ("model", word("name")),
        ("writes", _writes),
        ("context", number("context", 7)),
        ("ms/token", number("seconds_per_token", scale=1e3)),
        ("state bytes", number("state_bytes", 9)),
    ],
    "memory": [
        ("outer", word("outer")),
        ("preset", word("preset")),
        ("tokens", number("tokens", 6)),
        ("process GiB", number("resident", scale=2**-30)),
        ("seconds", number("seconds")),
    ],
    "steps": [
        ("optimizer", word("name")),
        ("ms/step", number("seconds_per_step", scale=1e3)),
        ("against", word("against")),
        ("time / its", number("ratio")),
        ("bytes kept per parameter", number("bytes_per_parameter", 2)),
        ("gate", word("gate")),
    ],
    "stream": [
        ("tokens read", number("tokens", 7)),
        ("µs/token", number("seconds_per_token", scale=1e6)),
        ("state bytes", number("state_bytes", 9)),
        ("process MB", number("resident", scale=1e-6)),
    ],
    "rivals": [
        ("layer", word("name")),
        ("pass", _pass),
        ("tokens/s", number("tokens_per_second")),
        ("ratio", number("ratio")),
        ("peak MB", number("peak_bytes", scale=1e-6)),
        ("writes all five memories", word("five")),
        ("parameters without a gradient", word("without_gradient")),
    ],
}


def render(rows: Sequence[Row], kind: str, *, markdown: bool = False) -> str:
    """A table of one kind of COLUMNS."""
    columns = COLUMNS[kind]
    cells = [[heading for heading, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
