"""Memory-mapped token shards: `shard-00000.bin` of little-endian uint16 or uint32 ids beside a JSON header.

A header is written after its ids and by renaming, so a shard that has a header is whole. Document offsets count from
the shard's own first token; a document that goes on into the next shard has no offset there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nestling.data.tokenizer import Tokenizer
from nestling.data.tokens import Tokens

FORMAT = "nestling-shard-1"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
REMEDY = "write the folder again with write_shards"
SOURCE = "source.json"  # what the folder is made of, where `nestling prepare` made it


def write_shards(
    documents: Iterable[str], tokenizer: Tokenizer, folder: str | Path, *, shard_tokens: int = 100_000_000
) -> list[Path]:
    """Encode documents into shards of `shard_tokens` ids (the last one shorter); returns the header paths.

    Memory holds one shard and one document. Raises FileExistsError if the folder has shards already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("shard-*")):
        raise FileExistsError(f"{folder} has shards already; choose an empty folder")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    made = encode_shards(documents, tokenizer, folder, "shard", shard_tokens)
    if not made:
        raise ValueError("no tokens to write; give documents that are not empty")
    return made


def encode_shards(
    documents: Iterable[str], tokenizer: Tokenizer, folder: Path, stem: str, shard_tokens: int
) -> list[Path]:
    """Encode documents into shards STEM-00000 ...; returns the header paths."""
    cut = _cut((tokenizer.encode(document) for document in documents), shard_tokens)
    return [_write_shard(folder / f"{stem}-{i:05d}", ids, starts, tokenizer) for i, (ids, starts) in enumerate(cut)]


def _cut(encoded: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Pack documents and yield (ids, document offsets) of `size` tokens each."""
    parts: list[np.ndarray] = []
    starts: list[int] = []
    held = 0
    for ids in encoded:
        if len(ids):
            starts.append(held)
        while len(ids):
            part, ids = ids[: size - held], ids[size - held :]
            parts.append(part)
            held += len(part)
            if held == size:
                yield np.concatenate(parts), starts
                parts, starts, held = [], [], 0
    if held:
        yield np.concatenate(parts), starts


def _write_shard(stem: Path, ids: np.ndarray, starts: list[int], tokenizer: Tokenizer) -> Path:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    packed = ids.astype(DTYPES[dtype])
    header = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "count": len(ids),
        "sha256": hashlib.sha256(packed.tobytes()).hexdigest(),
        "documents": starts,
    }
    packed.tofile(stem.with_suffix(".bin"))
    written, path = stem.with_suffix(".json.part"), stem.with_suffix(".json")
    written.write_text(json.dumps(header), encoding="utf-8")
    os.replace(written, path)
    return path


def open_shards(folder: str | Path, tokenizer: Tokenizer, *, verify: bool = False) -> Tokens:
    """All shards of a folder as one corpus, memory-mapped. `verify` reads every id once and compares checksums.

    Raises FileNotFoundError without shards; ValueError for a damaged shard, or ids of another tokenizer.
    """
    headers = sorted(Path(folder).glob("shard-*.json"))
    if not headers:
        raise FileNotFoundError(f"no shard-*.json in {folder}; make shards with: nestling prepare")
    refuse_unfinished(Path(folder))
    pieces: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    combined, base = hashlib.sha256(), 0
    for path in headers:
        header = _read_header(path, tokenizer)
        pieces.append(np.memmap(path.with_suffix(".bin"), dtype=DTYPES[header["dtype"]], mode="r"))
        if verify and hashlib.sha256(pieces[-1].tobytes()).hexdigest() != header["sha256"]:
            raise ValueError(f"{path.with_suffix('.bin')} is damaged (its checksum differs); {REMEDY}")
        starts.append(np.asarray(header["documents"], dtype=np.int64) + base)
        combined.update(json.dumps([header["sha256"], header["count"], header["documents"]]).encode())
        base += header["count"]
    return Tokens(
        pieces=pieces,
        starts=np.concatenate(starts),
        tokenizer=tokenizer.fingerprint,
        fingerprint=combined.hexdigest()[:16],
    )


def marker(folder: Path, unit: int) -> Path:
    """The file that says that a unit of a prepared folder is whole."""
    return folder / f"done-{unit:05d}.json"


def refuse_unfinished(folder: Path) -> None:
    """Raise ValueError for a folder that `nestling prepare` has begun and not finished."""
    if not (folder / SOURCE).is_file():
        return
    units = int(json.loads((folder / SOURCE).read_text(encoding="utf-8"))["units"])
    missing = sum(not marker(folder, unit).exists() for unit in range(units))
    if missing:
        raise ValueError(f"{folder} lacks {missing} of its {units} parts; call the same `nestling prepare` again")


def _read_header(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        known = header["format"] == FORMAT and {"tokenizer", "count", "sha256", "documents"} <= header.keys()
        itemsize = DTYPES[header["dtype"]].itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a shard header ({error}); {REMEDY}") from error
    if not known:
        raise ValueError(f"{path} is a header of format {header['format']!r}, not {FORMAT!r}; {REMEDY}")
    if header["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"{path} holds ids of tokenizer {header['tokenizer']}, not of {tokenizer.fingerprint}; "
            f"use the tokenizer that wrote it, or {REMEDY}"
        )
    data = path.with_suffix(".bin")
    size = data.stat().st_size if data.exists() else 0
    if size != header["count"] * itemsize:
        raise ValueError(f"{data} has {size} bytes, its header says {header['count'] * itemsize}; {REMEDY}")
    return dict(header)
