"""From measurements to git: result files, and the tables and the figure of docs/performance.md drawn from them."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import counts, targets
from nestling.bench import render

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
Records = Mapping[str, dict[str, Any]]
KEYS = ("recipe", "config", "seeds", "metrics", "commit", "versions", "hardware", "threads", "date")


def write(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """benchmarks/results/<what>-<date>-<hardware>.json. Raises ValueError for a record that lacks a key, or is
    too large for git."""
    missing = [key for key in KEYS if key not in record]
    text = json.dumps(rounded(record), indent=1)
    if missing or len(text) >= 200_000:
        raise ValueError(f"result has {len(text):,} bytes and lacks {missing}; need fewer than 200,000 and every key")
    folder.mkdir(parents=True, exist_ok=True)
    what = record["recipe"].removeprefix("bench ")
    path = folder / f"{what}-{record['date']}-cpu-{platform.machine()}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def rounded(tree: Any) -> Any:
    """Floats to five significant digits: more would be noise."""
    if isinstance(tree, float):
        return float(f"{tree:.5g}")
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return [rounded(value) for value in tree] if isinstance(tree, list | tuple) else tree


def newest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The newest result of every part, by its name."""
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: re.findall(r"\d{4}-\d\d-\d\d", p.name)):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["recipe"].removeprefix("bench ")] = record
    return found


def _rows(part: str, kind: str, key: str = "rows") -> Callable[[Records], str]:
    def table(records: Records) -> str:
        return f"{stamp(records[part])}\n\n{render(records[part]['metrics'][key], kind, markdown=True)}"

    return table


def _layers(threads: str) -> Callable[[Records], str]:
    return lambda records: render(records["layers"]["metrics"][threads], "layers", markdown=True)


def _chunks(records: Records) -> str:
    rows = [r for r in records["chunks"]["metrics"]["rows"] if r["training"] and r["name"] == "self-modifying"]
    lines = ["| chunk | tokens/s, forward + backward | of the block's | peak MB |", "|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['chunk_size']} | {r['tokens_per_second']:,.0f} | {r['ratio']:.2f} | {r['peak_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def _machine(records: Records) -> str:
    m = records["machine"]["metrics"]["1 thread"]
    values = (m["flops"] / 1e9, m["flops of width 64"] / 1e9, m["bandwidth"] / 1e9)
    lines = ["| one thread: GFLOP/s, 1024² product | GFLOP/s, batch of 64² | GB/s |", "|---|---|---|"]
    return "\n".join([stamp(records["machine"]), "", *lines, f"| {' | '.join(f'{v:,.1f}' for v in values)} |"])


def _slopes(records: Records) -> str:
    slopes = records["length"]["metrics"]["slopes"]
    lines = ["| | time | peak memory |", "|---|---|---|"]
    return "\n".join(lines + [f"| {n} | {s['seconds']:.2f} | {s['peak_bytes']:.2f} |" for n, s in slopes.items()])


def stamp(record: Mapping[str, Any]) -> str:
    """Where and when a result was measured."""
    versions = record["versions"]
    return f"{record['date']}, {record['hardware']}, torch {versions['torch']}, commit {record['commit']}"


TABLES: dict[str, tuple[str, Callable[[Records], str]]] = {  # marker in the page: part that it needs, table
    "machine": ("machine", _machine),
    "counts": ("machine", lambda records: counts.table(records["machine"]["metrics"]["1 thread"])),
    "targets": ("machine", lambda records: targets.table(records)),
    "ops": ("ops", _rows("ops", "ops")),
    "layers, 1 thread": ("layers", _layers("1 thread")),
    "layers, 2 threads": ("layers", _layers("2 threads")),
    "chunks": ("chunks", _chunks),
    "models": ("models", _rows("models", "models")),
    "readings": ("models", _rows("models", "readings", "readings")),
    "length": ("length", _rows("length", "length")),
    "slopes": ("length", _slopes),
    "decode": ("decode", _rows("decode", "decode")),
    "memory": ("memory", _rows("memory", "memory")),
    "optim": ("optim", _rows("optim", "steps")),
    "rivals": ("rivals", _rows("rivals", "rivals")),
    "stream": ("stream", _rows("stream", "stream", "stream")),
    "stream decode": ("stream", _rows("stream", "decode", "decoding")),
}


def fill(page: str, records: Records) -> str:
    """The page with every table between its markers made anew; "not measured" where there is no result.

    Raises ValueError for a marker that names no table.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"the page asks for table {name!r}; there are {', '.join(TABLES)}")
        part, made = TABLES[name]
        text = made(records) if part in records else "not measured"
        return f"<!-- table: {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def draw() -> None:
    """The figure and the tables from the committed results."""
    from benchmarks import plots

    records = newest()
    plots.draw(records)
    if PAGE.exists():
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")
