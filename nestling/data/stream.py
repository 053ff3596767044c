"""Packed contiguous rows: row b of each batch goes on where row b of the batch before stopped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nestling.data.tokens import Corpus


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of T+1 tokens; the last token of a batch is the first of the next."""

    tokens: Tensor  # (B, T+1) int64
    new_document: Tensor  # (B, T+1) bool, True at a document's first token

    @property
    def inputs(self) -> Tensor:
        """(B, T)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(B, T): the token after each input; -1 at the end of a document, where nothing can be predicted."""
        return self.tokens[:, 1:].masked_fill(self.new_document[:, 1:], -1)

    @property
    def borders(self) -> Tensor | None:
        """(B, T) True where an input starts a document; None where none does."""
        starts = self.new_document[:, :-1]
        return starts if bool(starts.any()) else None

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows."""
        return Batch(tokens=self.tokens[rows], new_document=self.new_document[rows])

    def to(self, device: torch.device | str) -> Batch:
        return Batch(tokens=self.tokens.to(device), new_document=self.new_document.to(device))


class TokenStream:
    """An endless iterator of batches over a ring of tokens.

    The ring is cut into `rows` stretches of equal length from an offset drawn from `seed`; row b starts at stretch b,
    reads on without a gap, and wraps around the end of the corpus by itself. So the whole position is one number.
    Of several processes each reads its own rows, `only`; all of them together read what one would.
    """

    def __init__(self, tokens: Corpus, *, rows: int, length: int, seed: int = 0, only: range | None = None):
        """`length` = T, the input tokens per row and batch. Raises ValueError if the corpus is shorter than a row."""
        if rows < 1 or length < 1:
            raise ValueError(f"rows={rows} and length={length} must both be at least 1")
        if len(tokens) < length + 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens, fewer than length + 1 = {length + 1}; "
                f"give more text or a smaller length"
            )
        self.tokens, self.rows, self.length, self.seed = tokens, rows, length, seed
        offset = int(np.random.default_rng(seed).integers(len(tokens)))
        self.only = range(rows) if only is None else only
        self.row_starts = [(offset + row * len(tokens) // rows) % len(tokens) for row in self.only]
        self.position = 0  # tokens that each row has read

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Batch:
        at = [(start + self.position) % len(self.tokens) for start in self.row_starts]
        ids = np.stack([self.tokens.take(start, self.length + 1) for start in at])
        borders = np.stack([self.tokens.document_starts(start, self.length + 1) for start in at])
        self.position += self.length
        return Batch(tokens=torch.from_numpy(ids), new_document=torch.from_numpy(borders))

    def state_dict(self) -> dict[str, int | str]:
        """The position, and what it is a position in."""
        return {
            "position": self.position,
            "rows": self.rows,
            "length": self.length,
            "seed": self.seed,
            "tokens": self.tokens.fingerprint,
        }

    def load_state_dict(self, saved: dict[str, int | str]) -> None:
        """Go to a saved position. Raises ValueError if it belongs to another corpus or another cutting into rows."""
        for name, here in self.state_dict().items():
            if name != "position" and saved.get(name) != here:
                raise ValueError(
                    f"the saved position is of a stream with {name}={saved.get(name)}, this one has {name}={here}; "
                    f"use the same data and sizes"
                )
        self.position = int(saved["position"])


def held_out_windows(tokens: Corpus, *, length: int, count: int) -> Tensor:
    """(count, length + 1) int64: windows at equal distances over the corpus, always the same ones."""
    last = len(tokens) - (length + 1)
    if last < 0:
        raise ValueError(
            f"the held-out text has {len(tokens)} tokens, fewer than one window of {length + 1}; "
            f"give more text or a smaller length"
        )
    starts = np.linspace(0, last, count).astype(np.int64)
    return torch.from_numpy(np.stack([tokens.take(int(start), length + 1) for start in starts]))
