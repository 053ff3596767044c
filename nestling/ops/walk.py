"""One call of a chunked memory: the rest of the open chunk, whole chunks, and the beginning of the next one.

What a token writes is generated at the last chunk border (the anchor) and goes into the running memory, so a call may
begin and end anywhere. Whole chunks, where nearly all tokens of a long call lie, go through one method that a kernel
can replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nestling.ops.alignment import Alignment, align

Matrices = list[Tensor]  # batch first; running holds what anchor holds, then what only runs on (surprise)
Tokens = Sequence[Tensor | None]  # (B, T, ...) each


class Chunked(Protocol):
    """A memory whose writes are generated at the last chunk border."""

    def step(
        self, tokens: Tokens, anchor: Matrices, running: Matrices, alive: Tensor | None
    ) -> tuple[Tensor, Matrices]:
        """A part of one chunk, (B, C, ...) -> y (B, C, ...), running. Not alive (B, C): writes and decays nothing."""

    def whole(self, tokens: Tokens, running: Matrices, full: Tensor | None, chunk_size: int) -> tuple[Tensor, Matrices]:
        """N whole chunks from a border on -> y, running. full (N, B): the rows that a chunk changes; None = all."""


def walk(
    memory: Chunked,
    tokens: Tokens,
    anchor: Matrices,
    running: Matrices,
    count: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Matrices, Matrices]:
    """Read and write every token -> y (B, T, ...), anchor and running after the real tokens of each row.

    count (B,): tokens of each row's open chunk, None = 0; lengths (B,): real tokens of each row, None = T.
    One token is a computation of fixed shape without synchronisation; more read the counts on the host.
    """
    first = tokens[0]
    assert first is not None
    if first.shape[1] == 1:
        return _token(memory, tokens, anchor, running, count, lengths, chunk_size)
    frame = align(first, count, lengths, chunk_size)
    y, anchor, running = _frame(memory, [None if x is None else frame.enter(x) for x in tokens], anchor, running, frame)
    return frame.leave(y), anchor, running


def pick(rows: Tensor | None, a: Matrices, b: Matrices) -> Matrices:
    """a in these rows (B,), else b; None = all rows. As many as b has."""
    if rows is None:
        return a[: len(b)]
    return [torch.where(rows.view(-1, *[1] * (y.dim() - 1)), x, y) for x, y in zip(a, b, strict=False)]


def _token(
    memory: Chunked,
    tokens: Tokens,
    anchor: Matrices,
    running: Matrices,
    count: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Matrices, Matrices]:
    """One token in every row, whatever its phase: a chunk of one, and a new anchor where it fills the open chunk."""
    like = running[0]
    written = torch.ones(len(like), dtype=torch.long, device=like.device)
    if lengths is not None:
        written = lengths.to(like.device).clamp(max=1)
    y, running = memory.step(tokens, anchor, running, None if lengths is None else written[:, None] > 0)
    full = written if count is None else count.to(like.device) + written
    return y, pick(full == chunk_size, running, anchor), running


def _frame(
    memory: Chunked, tokens: Tokens, anchor: Matrices, running: Matrices, frame: Alignment
) -> tuple[Tensor, Matrices, Matrices]:
    C, alive, outputs = frame.chunk_size, frame.alive(), []

    def step(part: slice) -> Matrices:
        here = None if alive is None else alive[:, part]
        y, grown = memory.step(_cut(tokens, part), anchor, running, here)
        outputs.append(y)
        return grown

    begin = 0
    if frame.frame and (frame.first < C or frame.start is not None):  # a chunk is open
        begin = min(frame.first, frame.frame)
        running = step(slice(0, begin))
        if begin == frame.first:
            anchor = pick(frame.full(begin), running, anchor)
    end = begin + (frame.frame - begin) // C * C
    if end > begin:
        y, at_border = memory.whole(_cut(tokens, slice(begin, end)), running, _full(frame, begin, end), C)
        outputs.append(y)
        anchor = pick(frame.full(begin) if begin else None, at_border, anchor)
        running = at_border
        if frame.end is not None:
            running = _open(memory, tokens, anchor, running, frame.end, begin, end, C)
    if frame.frame > end:
        running = step(slice(end, frame.frame))
    y = torch.cat(outputs, 1) if outputs else torch.zeros_like(tokens[0])  # type: ignore[arg-type]
    return y, anchor, running


def _cut(tokens: Tokens, part: slice) -> Tokens:
    return [None if x is None else x[:, part] for x in tokens]


def _full(frame: Alignment, begin: int, end: int) -> Tensor | None:
    """(N, B): the rows that fill each whole chunk between two borders, None where all do."""
    if frame.end is None:
        return None
    borders = torch.arange(begin + frame.chunk_size, end + 1, frame.chunk_size, device=frame.end.device)
    return frame.end >= borders[:, None]


def _open(
    memory: Chunked,
    tokens: Tokens,
    anchor: Matrices,
    running: Matrices,
    stop: Tensor,
    begin: int,
    end: int,
    chunk_size: int,
) -> Matrices:
    """The running memory of the rows that stop (B,) inside the whole chunks: their last chunk once more, in part."""
    start = begin + (stop - begin).clamp(min=0) // chunk_size * chunk_size
    place = start[:, None] + torch.arange(chunk_size, device=stop.device)  # (B, C)
    alive = (place < stop[:, None]) & (start < end)[:, None]
    again = []
    for x in tokens:
        index = place if x is None else place.clamp(max=x.shape[1] - 1).view(*place.shape, *[1] * (x.dim() - 2))
        again.append(None if x is None else x.gather(1, index.expand(-1, -1, *x.shape[2:])))
    return memory.step(again, anchor, running, alive)[1]
