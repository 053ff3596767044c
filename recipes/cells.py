"""Cells: one training run or measurement each, saved when done and skipped when found, so that a table resumes."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestling.evals.record import provenance

Cell = dict[str, Any]


def cell(folder: Path, name: str, work: Callable[[], Cell]) -> Cell:
    """The saved result of a cell, or the result of `work`, saved with the CPU seconds that it took."""
    path = folder / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    began = spent()
    made = work() | {"cpu_seconds": round(spent() - began, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made), encoding="utf-8")
    os.replace(partial, path)
    print(f"{name}: done in {made['cpu_seconds']:.0f} CPU seconds", file=sys.stderr, flush=True)
    return made


def spent() -> float:
    """CPU seconds so far, of this process and of the ones that it waited for."""
    return sum(os.times()[:4])


def cpu_minutes(tree: Any) -> float:
    """What the cells of a result took together, each counted once where it stands."""
    if isinstance(tree, dict):
        return tree.get("cpu_seconds", 0.0) / 60 + sum(cpu_minutes(v) for v in tree.values())
    return sum(cpu_minutes(v) for v in tree) if isinstance(tree, list) else 0.0


def record(recipe: str, config: Cell, seeds: list[int], metrics: Cell) -> Cell:
    """Metrics with everything that identifies the measurement."""
    return {"recipe": recipe, "config": config, "seeds": seeds, "metrics": metrics} | provenance()


def write_result(
    recipe: str, config: Cell, seeds: list[int], metrics: Cell, *, results: Path = Path("results")
) -> Path:
    """Write results/<recipe>/<date>-<hardware>.json."""
    made = record(recipe, config, seeds, metrics)
    path = results / recipe / f"{made['date']}-cpu-{platform.machine()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return path


def rounded(tree: Any) -> Any:
    """Numbers with five digits, None for what is no finite number: files that can be read and compared."""
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [rounded(v) for v in tree]
    if isinstance(tree, float):
        return float(f"{tree:.5g}") if math.isfinite(tree) else None
    return tree
