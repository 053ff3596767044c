"""The model card beside saved weights: what is written when, in the front matter and the table of a README.md."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..core.level import Level, Levels

_MARK = "<!-- written by nestling.hf; delete this line to keep your own text -->"


def write_card(folder: str | os.PathLike[str], name: str, levels: Levels, parameters: int) -> None:
    """Write README.md, unless there is one that somebody else wrote."""
    path = Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        return
    path.write_text(card(name, levels, parameters), encoding="utf-8")


def card(name: str, levels: Levels, parameters: int) -> str:
    """The text of the card."""
    rows = [_row(level) for level in levels]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [nestling, nested-learning, continual-learning]",
            "---",
            _MARK,
            f"# {name}",
            "",
            f"{parameters:,} parameters. Load it with `import nestling.hf` and `AutoModelForCausalLM.from_pretrained`. "
            "It is a static model until it is called with `learn=True` or reads in a `nestling.Session`; then these "
            "memories are written, each sequence its own:",
            "",
            "| level | clock | written every | rule | parameters |",
            "|---|---|---:|---|---:|",
            *rows,
            "",
        ]
    )


def _row(level: Level) -> str:
    period = "never" if math.isinf(level.period) else "at every read" if level.period == 0 else f"{level.period:g}"
    return f"| {level.name} | {level.clock} | {period} | {level.rule} | {level.parameters:,} |"
