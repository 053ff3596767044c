"""Rows that stand at different places of their chunk, brought into one frame in which their chunks begin together.

Row b enters with count_b tokens of an open chunk behind it. In the frame its first token stands count_b - min(count)
places from the left, so every row meets a chunk border at the same places: after `first` tokens and then after every
chunk_size more. Places without a token are dead: they must write nothing and decay nothing. Equal counts, the common
case, need no shift. Reads the counts, so it synchronises with a device: single tokens are for the ops to step alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """Where the rows of one call stand in the frame."""

    tokens: int  # T of the call
    frame: int  # places of the frame, T if nothing is shifted
    first: int  # places before the frame's first chunk border, 1 to chunk_size; may lie beyond the frame
    chunk_size: int
    start: Tensor | None  # (B,) place of each row's first token; None = 0 in all rows
    end: Tensor | None  # (B,) place after each row's last token; None = T in all rows

    def enter(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, frame, ...). Dead places repeat the row's nearest input."""
        if self.start is None or self.tokens == 0:
            return x
        place = torch.arange(self.frame, device=x.device) - self.start[:, None]
        return _take(x, place.clamp(0, self.tokens - 1))

    def leave(self, y: Tensor) -> Tensor:
        """(B, frame, ...) -> (B, T, ...): what belongs to the call's tokens."""
        if self.start is None or self.tokens == 0:
            return y
        return _take(y, self.start[:, None] + torch.arange(self.tokens, device=y.device))

    def alive(self) -> Tensor | None:
        """(B, frame) bool, False at dead places; None if there are none."""
        if self.end is None:
            return None
        place = torch.arange(self.frame, device=self.end.device)
        alive = place < self.end[:, None]
        return alive if self.start is None else alive & (place >= self.start[:, None])

    def chunks(self) -> Iterator[slice]:
        """The frame cut at its chunk borders; the first and the last part may be short."""
        start = 0
        for border in range(self.first, self.frame + self.chunk_size, self.chunk_size):
            if start < self.frame:
                yield slice(start, min(border, self.frame))
            start = border

    def is_border(self, place: int) -> bool:
        """Whether a chunk ends before this place."""
        return place >= self.first and (place - self.first) % self.chunk_size == 0

    def full(self, border: int) -> Tensor | None:
        """(B,) bool: the rows that reach this border and so fill the chunk before it; None = all."""
        return None if self.end is None else self.end >= border


def align(rows: Tensor, count: Tensor | None, lengths: Tensor | None, chunk_size: int) -> Alignment:
    """The frame of a call. rows (B, T, ...): any input; count (B,): tokens of each row's open chunk, None = 0;
    lengths (B,): real tokens of each row, None = T.
    """
    tokens = rows.shape[1]
    end = None if lengths is None else lengths.to(rows.device)
    if count is None or not len(count):
        return Alignment(tokens, tokens, chunk_size, chunk_size, None, end)
    phase, latest = (int(x) for x in count.aminmax())
    if latest == phase:
        return Alignment(tokens, tokens, chunk_size - phase, chunk_size, None, end)
    start = count.to(rows.device) - phase
    end = start + (tokens if end is None else end)
    return Alignment(tokens, tokens + latest - phase, chunk_size - phase, chunk_size, start, end)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, ...) at index (B, N) -> (B, N, ...)."""
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
