"""metrics.jsonl: one JSON line per step, each step once; and the figures that stand in it."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nestling.models.state import State
from nestling.train.files import replace_file


class MetricsFile:
    """An open metrics.jsonl; a line is with the operating system when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed in __exit__

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Raises OSError when the disk is full."""
        self.file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Wait until the disk has all lines."""
        os.fsync(self.file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()


def finite(value: Any) -> Any:
    """The same record with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, up to the first line that is cut short (only a kill or a full disk makes one)."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of steps 1 ... `step`, so that the steps to come stand there once. Atomic."""
    kept = [r for r in read_metrics(path) if r["step"] <= step] if path.exists() else []
    replace_file(path, "".join(json.dumps(r) + "\n" for r in kept).encode())


def peak_memory(device: torch.device) -> int:
    """Bytes: the largest resident size of the process, or the largest allocation on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_counts(before: State | None, after: State) -> list[int]:
    """Writes of each level (of the last block, fast to slow) between two states, summed over rows."""
    counts = after.writes.sum(0)
    return (counts if before is None else counts - before.writes.sum(0)).tolist()


def write_norms(state: State) -> dict[str, float]:
    """Mean over rows of the length of each level's last write, relative to its weights, by the level's path."""
    norms = state.write_norms
    means = torch.stack([norm.mean() for norm in norms.values()]).tolist() if norms else []
    return dict(zip(norms, means, strict=True))
