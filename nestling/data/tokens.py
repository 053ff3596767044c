"""A corpus as one ring of token ids with document borders, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nestling.data.tokenizer import Tokenizer


class Corpus(Protocol):
    """What a stream asks of token ids. They are read as a ring: after the last comes the first."""

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that made the ids."""

    @property
    def fingerprint(self) -> str:
        """Equal for two corpora exactly if ids and borders are equal."""

    def __len__(self) -> int: ...

    def take(self, start: int, length: int) -> np.ndarray:
        """`length` ids (int64) from position `start` on, around the ring as often as needed."""

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """(length,) bool: True where `take(start, length)` has the first token of a document."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids, read as a ring: after the last comes the first."""

    pieces: Sequence[np.ndarray]  # one array of ids per shard, read only where needed
    starts: np.ndarray  # (documents,) int64, ascending: the position of each document's first token
    tokenizer: str  # fingerprint of the tokenizer that made the ids
    fingerprint: str  # equal for two corpora exactly if ids and borders are equal

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError("no tokens; give a text that is not empty")

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def take(self, start: int, length: int) -> np.ndarray:
        """`length` ids (int64) from position `start` on, around the ring as often as needed."""
        found: list[np.ndarray] = []
        position = start % len(self)
        while length > 0:
            for piece in self.pieces:
                if position >= len(piece):
                    position -= len(piece)
                    continue
                part = np.asarray(piece[position : position + length], dtype=np.int64)
                found.append(part)
                length -= len(part)
                position = 0
                if length == 0:
                    break
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """(length,) bool: True where `take(start, length)` has the first token of a document."""
        positions = (start + np.arange(length)) % len(self)
        slots = np.minimum(np.searchsorted(self.starts, positions), len(self.starts) - 1)
        return self.starts[slots] == positions


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """Encode documents and pack them, one after the other."""
    ids = [tokenizer.encode(document) for document in documents]
    starts = np.cumsum([0] + [len(part) for part in ids[:-1]], dtype=np.int64)
    packed = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
    return Tokens(pieces=[packed], starts=starts, tokenizer=tokenizer.fingerprint, fingerprint=digest([packed], starts))


def digest(pieces: Sequence[np.ndarray], starts: np.ndarray) -> str:
    """16 hex digits of the SHA-256 of all ids and borders."""
    hashed = hashlib.sha256(starts.astype("<i8").tobytes())
    for piece in pieces:
        hashed.update(piece.astype("<i8").tobytes())
    return hashed.hexdigest()[:16]
