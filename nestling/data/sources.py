"""Sources: where documents come from, cut into units that are read independently of each other.

    units = units_of("corpus/")            # files of text, lines of JSON, tables of Parquet, or data sets of the hub
    for document in units[0].documents("text"): ...

A unit is read in one go by one process: a text file, some millions of bytes of a JSONL file, one row group of a
Parquet file, or one shard of a data set. The list of units depends on the source alone, not on who reads it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.data.text import read_text

JSONL_BYTES = 1 << 26  # of one unit
HUB, HUB_UNITS = "hub:", 64  # the prefix of a data set's name, and its units if it does not say how many files it has
SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Unit(ABC):
    """A part of a source. Abstract: the finals say how it is read."""

    @abstractmethod
    def documents(self, field: str) -> Iterator[str]:
        """Its documents in order; of records the text in `field`. Raises ValueError where there is none."""


@dataclass(frozen=True)
class TextFile(Unit):
    """One document."""

    path: Path

    def documents(self, field: str) -> Iterator[str]:
        yield read_text(self.path)


@dataclass(frozen=True)
class JsonLines(Unit):
    """The lines that begin in [start, stop) of a file; each is a JSON object."""

    path: Path
    start: int
    stop: int

    def documents(self, field: str) -> Iterator[str]:
        with open(self.path, "rb") as file:
            file.seek(max(0, self.start - 1))
            if self.start:
                file.readline()  # begins before
            while file.tell() < self.stop and (line := file.readline()):
                if line.strip():
                    yield self._text(line, field, file.tell() - len(line))

    def _text(self, line: bytes, field: str, at: int) -> str:
        try:
            return text_in(json.loads(line), field, f"{self.path} at byte {at}")
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} at byte {at} is not JSON ({error}); correct the line or take it out"
            ) from error


@dataclass(frozen=True)
class ParquetRows(Unit):
    """One row group of a file."""

    path: Path
    group: int

    def documents(self, field: str) -> Iterator[str]:
        file = pyarrow_parquet().ParquetFile(self.path)
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"{self.path} has no column {field!r}; name one of {', '.join(names)} with --field")
        for batch in file.iter_batches(row_groups=[self.group], columns=[field]):
            for record in batch.to_pylist():
                yield text_in(record, field, str(self.path))


@dataclass(frozen=True)
class HubShard(Unit):
    """One of `count` shards of the split "train" of a data set, read as it arrives."""

    name: str
    config: str | None
    index: int
    count: int

    def documents(self, field: str) -> Iterator[str]:
        found = datasets_library().load_dataset(self.name, self.config, split="train", streaming=True)
        for record in found.shard(num_shards=self.count, index=self.index):
            yield text_in(record, field, f"{HUB}{self.name}")


def units_of(name: str | Path) -> list[Unit]:
    """The units of a file, of all files below a folder in order of their paths, or of "hub:NAME[:CONFIG]".

    Raises FileNotFoundError, or ValueError if nothing there can be read.
    """
    if str(name).startswith(HUB):
        return hub_units(str(name).removeprefix(HUB))
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}; check the path, or name a data set of the hub: {HUB}NAME")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(f"folder {path} has no file that ends in {', '.join(SUFFIXES)}; give another folder")
    return [unit for file in files for unit in file_units(file)]


def file_units(path: Path) -> list[Unit]:
    """The units of one file; a file of an unknown kind is text."""
    if path.name.endswith(".jsonl"):
        size = path.stat().st_size
        return [JsonLines(path, at, min(size, at + JSONL_BYTES)) for at in range(0, size, JSONL_BYTES)]
    if path.name.endswith(".parquet"):
        return [ParquetRows(path, i) for i in range(pyarrow_parquet().ParquetFile(path).num_row_groups)]
    return [TextFile(path)]


def hub_units(name: str) -> list[Unit]:
    """The shards of a data set, as many as it has files."""
    place, _, config = name.partition(":")
    found = datasets_library().load_dataset(place, config or None, split="train", streaming=True)
    count = getattr(found, "num_shards", HUB_UNITS)
    return [HubShard(place, config or None, index, count) for index in range(count)]


def text_in(record: Any, field: str, where: str) -> str:
    """The text of a record. Raises ValueError naming the fields that it has."""
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text in the field {field!r}; it has {has}: name one with --field")
    return text


def pyarrow_parquet() -> Any:
    """The optional package, imported where it is used."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need the package pyarrow: pip install 'nestling[data]'") from error
    return pyarrow.parquet


def datasets_library() -> Any:
    """The optional package, imported where it is used."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data sets of the hub need the package datasets: pip install 'nestling[data]'") from error
    return datasets
