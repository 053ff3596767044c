"""Blocks: corpora read in another order, or several read in given proportions, as one ring.

    shuffled(tokens, block=1_000_000, seed=0)            # blocks of whole documents in random order
    mixture({"web": (web, 0.8), "books": (books, 0.2)})  # 80 % of the tokens from the web, 20 % from books

A ring is a list of (corpus, start, length); nothing is copied, nothing is drawn while it is read. So a position in it
is one number, as in any corpus, and every process finds its own rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from nestling.data.tokens import Corpus, Tokens

BLOCK = 1 << 20  # tokens of a block, at least


class Blocks:
    """Stretches of corpora, one behind the other. Each begins with a document.

    Args:
        corpora: all of one tokenizer. source, start, length: (blocks,) int64, which corpus, from where, how much.
    """

    def __init__(self, corpora: Sequence[Corpus], source: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        if len({corpus.tokenizer for corpus in corpora}) != 1:
            made = ", ".join(corpus.tokenizer for corpus in corpora)
            raise ValueError(f"the corpora were made by different tokenizers ({made}); make all with one")
        self.corpora, self.source, self.start = corpora, source, start
        self.ends = np.cumsum(length)
        self.tokenizer = corpora[0].tokenizer
        digest = hashlib.sha256("".join(corpus.fingerprint for corpus in corpora).encode())
        for part in (source, start, length):
            digest.update(part.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, start: int, length: int) -> np.ndarray:
        """`length` ids (int64) from position `start` on, around the ring as often as needed."""
        parts = [corpus.take(at, size) for corpus, at, size, _ in self._stretches(start, length)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """(length,) bool: True at the first token of a document, and where a block begins."""
        parts = []
        for corpus, at, size, fresh in self._stretches(start, length):
            starts = corpus.document_starts(at, size).copy()
            starts[0] |= fresh
            parts.append(starts)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def _stretches(self, start: int, length: int) -> list[tuple[Corpus, int, int, bool]]:
        """Which corpora a stretch of the ring lies in: from where, how much, and whether a block begins there."""
        found = []
        position = start % len(self)
        while length > 0:
            block = int(np.searchsorted(self.ends, position, side="right"))
            first = int(self.ends[block - 1]) if block else 0
            size = min(length, int(self.ends[block]) - position)
            corpus = self.corpora[int(self.source[block])]
            found.append((corpus, int(self.start[block]) + position - first, size, position == first))
            position, length = (position + size) % len(self), length - size
        return found


def shuffled(tokens: Tokens, *, block: int = BLOCK, seed: int) -> Blocks:
    """The same tokens, in blocks of whole documents of `block` tokens or more, in an order drawn from `seed`."""
    start, length = blocks_of(tokens, block)
    order = np.random.default_rng(seed).permutation(len(start))
    return Blocks([tokens], np.zeros(len(start), dtype=np.int64), start[order], length[order])


def blocks_of(tokens: Tokens, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of blocks of whole documents, `block` tokens or more, the last one apart."""
    if block < 1:
        raise ValueError(f"block={block} must be at least 1; 1 makes every document a block")
    borders = [0]
    while (after := int(np.searchsorted(tokens.starts, borders[-1] + block))) < len(tokens.starts):
        borders.append(int(tokens.starts[after]))
    start = np.asarray(borders, dtype=np.int64)
    return start, np.diff(np.append(start, len(tokens)))


def mixture(parts: Mapping[str, tuple[Tokens, float]], *, block: int = BLOCK, seed: int = 0) -> Blocks:
    """Several corpora in one ring, in which each has its share of the tokens, weight / sum of weights.

    The corpora, each shuffled, are dealt block by block to whichever is furthest behind its share. The ring ends when
    the corpus that lasts longest has been read once; the others are read again, as often as needed.
    Raises ValueError for a weight that is not positive.
    """
    for name, (_, weight) in parts.items():
        if not weight > 0:
            raise ValueError(f"the weight of {name} is {weight}; use a number above 0, or leave it out")
    corpora = [tokens for tokens, _ in parts.values()]
    shares = np.array([weight for _, weight in parts.values()]) / sum(weight for _, weight in parts.values())
    total = max(len(corpus) / share for corpus, share in zip(corpora, shares, strict=True))
    cut = [_shuffled_blocks(corpus, block, seed + i) for i, corpus in enumerate(corpora)]
    taken, turn = np.zeros(len(corpora)), np.zeros(len(corpora), dtype=np.int64)
    dealt: list[tuple[int, int, int]] = []
    while taken.sum() < total:
        i = int(np.argmin(taken / shares))
        start, length = (column[turn[i] % len(column)] for column in cut[i])
        dealt.append((i, int(start), int(length)))
        taken[i] += length
        turn[i] += 1
    source, start, length = np.asarray(dealt, dtype=np.int64).T
    return Blocks(corpora, source, start, length)


def _shuffled_blocks(tokens: Tokens, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    start, length = blocks_of(tokens, block)
    order = np.random.default_rng(seed).permutation(len(start))
    return start[order], length[order]
