"""Prepare: any source of documents becomes a folder of token shards, in parallel, and goes on where it was stopped.

Every unit of the source (sources.py) is encoded by itself into shards of its own, shard-UNIT-NUMBER, and leaves
done-UNIT.json when it is whole. So the folder is the same whatever the number of workers and interruptions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nestling.data.shards import SOURCE, encode_shards, marker
from nestling.data.sources import Unit, units_of
from nestling.data.tokenizer import load_tokenizer

SHARD_TOKENS = 100_000_000
Report = Callable[[int, int, int], None]  # units done, units in all, tokens


def prepare_shards(
    source: str | Path,
    folder: str | Path,
    *,
    tokenizer: str = "bytes",
    field: str = "text",
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = lambda done, units, tokens: None,
) -> int:
    """Encode a source into a folder; returns the number of tokens. A folder that was begun is finished.

    Args:
        source: see `units_of`. tokenizer: "bytes" or a tokenizer.json. field: of records, where their text is.
        workers: processes. shard_tokens: tokens of a shard at most. report: is told after every unit.
    Raises ValueError if the folder was begun from another source or with other settings, or if there is no text.
    """
    folder, units = Path(folder), units_of(source)
    folder.mkdir(parents=True, exist_ok=True)
    agree(folder, units, {"tokenizer": load_tokenizer(tokenizer).fingerprint, "field": field, "shard": shard_tokens})
    todo = [i for i in range(len(units)) if not marker(folder, i).exists()]
    tokens = sum(tokens_of(folder, i) for i in range(len(units)) if marker(folder, i).exists())
    report(len(units) - len(todo), len(units), tokens)
    calls = [(units[i], i, folder, tokenizer, field, shard_tokens) for i in todo]
    for done, more in enumerate(encoded(calls, workers), len(units) - len(todo) + 1):
        tokens += more
        report(done, len(units), tokens)
    if tokens == 0:
        raise ValueError(f"{source} has no text, so there are no tokens; give another source")
    return tokens


def encode_unit(unit: Unit, number: int, folder: Path, tokenizer: str, field: str, shard_tokens: int) -> int:
    """Write the shards of one unit, and then its marker; returns its tokens."""
    stem = f"shard-{number:05d}"
    for left in folder.glob(f"{stem}-*"):  # of an interruption
        left.unlink()
    made = encode_shards(unit.documents(field), load_tokenizer(tokenizer), folder, stem, shard_tokens)
    tokens = sum(int(json.loads(path.read_text(encoding="utf-8"))["count"]) for path in made)
    written = marker(folder, number).with_suffix(".part")
    written.write_text(json.dumps({"tokens": tokens, "shards": len(made)}), encoding="utf-8")
    written.replace(marker(folder, number))
    return tokens


def tokens_of(folder: Path, number: int) -> int:
    """Tokens of a unit that is whole."""
    return int(json.loads(marker(folder, number).read_text(encoding="utf-8"))["tokens"])


def agree(folder: Path, units: list[Unit], settings: dict[str, Any]) -> None:
    """Write down what the folder is made of, or compare. Raises ValueError if that differs."""
    listed = hashlib.sha256("\n".join(map(repr, units)).encode()).hexdigest()[:16]
    mine = {"units": len(units), "list": listed, **settings}
    path = folder / SOURCE
    if not path.exists():
        if any(folder.glob("shard-*")):
            raise ValueError(f"{folder} has shards that were not made here; choose an empty folder")
        path.write_text(json.dumps(mine), encoding="utf-8")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{name} {theirs.get(name)} -> {value}" for name, value in mine.items() if theirs.get(name) != value]
    if changed:
        raise ValueError(f"{folder} was begun with other settings: {'; '.join(changed)}; choose an empty folder")


def encoded(calls: list[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """The tokens of every unit as it becomes whole, in this process or in several new ones."""
    if workers == 1:
        yield from (encode_unit(*call) for call in calls)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(encode_unit, *call) for call in calls]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
