"""Run the benchmarks and write their results: `python -m benchmarks.run all`, or the parts that are named.

    python -m benchmarks.run all             # every part, then benchmarks/results, the figure and docs/performance.md
    python -m benchmarks.run layers models   # some parts
    python -m benchmarks.run draw            # figure and page again from the committed results

A part that is done is kept in runs/bench/<hash of the sources> and not run again until a source changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compiled, report, rivals
from nestling import bench
from nestling.bench.suites import MODELS
from nestling.evals import provenance
from recipes.cells import Cell, cell, record, spent

RUNS = Path("runs/bench")


def machine() -> Cell:
    """What one thread of this machine can reach."""
    return {"1 thread": bench.ceilings()}


def one() -> dict[str, float]:
    """The same, measured once."""
    return part("machine")["1 thread"]


def layers() -> Cell:
    """The layers by number of threads, at the shape of the target; CPU time adds the threads up, so both numbers of
    threads have the floor of one."""
    made = {}
    for count, name in ((1, "1 thread"), (2, "2 threads")):
        with bench.threads(count):
            made[name] = bench.layers(one())
    return made


def length() -> Cell:
    rows = bench.lengths()
    return {"rows": rows, "slopes": bench.slopes(rows)}


def stream() -> Cell:
    """In a process of its own: what it holds must not be what earlier parts left."""
    command = [sys.executable, "-m", "nestling", "bench", "stream", "--json"]
    tables = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["tables"]
    return {"stream": tables["stream"], "decoding": tables["decode"]}


PARTS: dict[str, Callable[[], Cell]] = {
    "machine": machine,
    "ops": lambda: {"rows": bench.ops(one(), bench.Shape())},
    "layers": layers,
    "chunks": lambda: {"rows": bench.by_chunk(one(), repeats=3)},
    "models": lambda: {"rows": bench.models(one(), repeats=5), "readings": bench.readings(one())},
    "length": length,
    "decode": lambda: {"rows": bench.decoding()},
    "memory": lambda: {"rows": [bench.long_step(outer=outer) for outer in ("segment", "sequence")]},
    "optim": lambda: {"rows": bench.steps()},
    "compiled": compiled.compare,
    "rivals": rivals.compare,
    "stream": stream,
}
CONFIG: dict[str, Any] = {
    "layers": {"dim": 256, "heads": 4, "rows": 2, "tokens": 2048, "dtype": "float32", "chunk_size": 64},
    "models": {"preset": "tiny", "rows": 2, "tokens": 2048, "models": {n: str(o) for n, (_, o) in MODELS.items()}},
    "length": {"dim": 128, "heads": 2, "preset": "tiny", "rows": 1},
    "compiled": {**compiled.SIZES, "repeats": compiled.REPEATS, "dtype": "float32"},
    "optim": {"dim": 256, "depth": 4, "steps": 20, "dtype": "float32"},
    "rivals": {"dim": rivals.DIM, "heads": rivals.HEADS, "rows": rivals.ROWS},
}


def sources() -> str:
    """Hash of the package and of this folder."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*(root / "nestling").rglob("*.py"), *(root / "benchmarks").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def part(name: str) -> Cell:
    """What a part measured, now or earlier."""
    return cell(RUNS / sources(), name, PARTS[name])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "all", "draw"))
    wanted = parser.parse_args(argv).parts
    torch.set_num_threads(1)
    began, commit = spent(), provenance()["commit"]  # before results make the checkout dirty
    for name in PARTS if "all" in wanted else [n for n in wanted if n != "draw"]:
        made = part(name)
        print(report.write(record(f"bench {name}", CONFIG.get(name, {}), [0], made) | {"commit": commit}))
    print(f"measured in {spent() - began:.0f} CPU seconds", file=sys.stderr)
    report.draw()


if __name__ == "__main__":
    main()
