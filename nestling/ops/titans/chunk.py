"""Titans in chunks: one Python loop over chunks, everything inside a chunk in parallel (README.md).

All gradients of a chunk are taken at its first state, so each is an outer product f_s e_s^T of a matrix's input and
the error at its output, and momentum and forgetting are linear: what token t finds of the write of token s is one
number, c_ts. Along the loop only the writes are made; all chunks are read together afterwards.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nestling.ops.chunks import from_chunks, to_chunks
from nestling.ops.groups import in_groups
from nestling.ops.titans.reference import check
from nestling.ops.titans.writes import advance, prepare
from nestling.ops.walk import Matrices, pick, walk


class WholeChunks(Protocol):
    """N >= 1 whole chunks from a chunk border on: what a kernel replaces.

    q, k, v       (B, N*C, H, K), in the dtype of the caller's values; no dead tokens but behind a row's end
    eta, log_decay, log_momentum   (B, N*C, H); log_momentum None = no momentum, and no S in running
    rest          initial weights (H, F, V) if the memory decays towards them, else None (towards zero)
    running       float32 (float64 for float64 values), one per matrix (B, H, F, V): M - rest, then, with momentum, S
    full          (N, B) bool: rows where chunk n changes `running`; elsewhere it stays as it was at the chunk's
                  start, and y may be anything finite. A row's full chunks come first. None = all rows, all chunks
    Returns y (B, N*C, H, K) in v's dtype or running's, and the new running. Differentiable in every tensor but `full`.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        log_decay: Tensor,
        log_momentum: Tensor | None,
        *,
        rest: tuple[Tensor, ...] | None,
        running: Matrices,
        full: Tensor | None,
        chunk_size: int,
        normalized: bool,
    ) -> tuple[Tensor, Matrices]: ...


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    *,
    weights: tuple[Tensor, ...],
    state: tuple[Tensor, ...] | None = None,
    chunk_size: int = 64,
    decay_to: Literal["zero", "initial"] = "zero",
    normalized: bool = False,
    count: Tensor | None = None,
    lengths: Tensor | None = None,
    whole: WholeChunks | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same numbers as reference.titans at the same chunk_size; arguments and results as there.

    whole: what runs whole chunks, `whole_chunks` or a kernel of the same contract. A call of one token has a fixed
    shape and does not synchronise.
    """
    check(k, weights, state, log_momentum is not None, chunk_size, decay_to)
    with torch.autocast(v.device.type, enabled=False):
        memory = _Memory(weights, decay_to, normalized, log_momentum is not None, whole or whole_chunks, v.dtype)
        anchor, running = memory.enter(len(v), state)
        tokens = (q, k, v, eta, torch.zeros_like(eta) if log_decay is None else log_decay, log_momentum)
        y, anchor, running = walk(memory, tokens, anchor, running, count, lengths, chunk_size)
        return y.to(v.dtype), memory.leave(anchor, running)


class _Memory:
    """How `walk` sees it. Anchor and running hold what decays: weights and deviation, or the deviation alone."""

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        decay_to: str,
        normalized: bool,
        momentum: bool,
        whole: WholeChunks,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.weights = tuple(w.to(self.dtype) for w in weights)
        self.rest = self.weights if decay_to == "initial" else None
        self.normalized, self.momentum, self.chunks = normalized, momentum, whole

    def enter(self, rows: int, state: tuple[Tensor, ...] | None) -> tuple[Matrices, Matrices]:
        matrices = len(self.weights)
        fresh = [w.new_zeros(rows, *w.shape) for w in self.weights]
        given = fresh * (3 if self.momentum else 2) if state is None else [s.to(self.dtype) for s in state]
        if self.rest is None:
            given = [*(w + d for w, d in zip(self.weights * 2, given, strict=False)), *given[2 * matrices :]]
        return given[:matrices], given[matrices:]

    def leave(self, anchor: Matrices, running: Matrices) -> tuple[Tensor, ...]:
        out = (*anchor, *running)
        if self.rest is not None:
            return out
        return (*(m - w for w, m in zip(self.weights * 2, out, strict=False)), *out[2 * len(self.weights) :])

    def step(self, tokens: Any, anchor: Matrices, running: Matrices, alive: Tensor | None) -> tuple[Tensor, Matrices]:
        chunk = [None if x is None else to_chunks(x, x.shape[1], self.dtype)[0].flatten(0, 1) for x in tokens]
        if alive is not None:
            alive = alive.repeat_interleave(running[0].shape[1], 0)
            chunk[3:] = [None if x is None else x.masked_fill(~alive, 0) for x in chunk[3:]]
        rest = _per_row(self.rest, running)
        part = prepare(chunk, rest, len(anchor) == 2, self.normalized, alive)
        y, after = advance(part, rest, [x.flatten(0, 1) for x in anchor], [x.flatten(0, 1) for x in running])
        shape = running[0].shape[:2]
        return y.unflatten(0, shape).transpose(1, 2), [x.unflatten(0, shape) for x in after]

    def whole(self, tokens: Any, running: Matrices, full: Tensor | None, chunk_size: int) -> tuple[Tensor, Matrices]:
        options: Any = {"rest": self.rest, "chunk_size": chunk_size, "normalized": self.normalized}
        return self.chunks(*tokens, running=running, full=full, **options)


def whole_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    *,
    rest: tuple[Tensor, ...] | None,
    running: Matrices,
    full: Tensor | None,
    chunk_size: int,
    normalized: bool,
) -> tuple[Tensor, Matrices]:
    """`WholeChunks` in torch."""
    dtype = running[0].dtype
    tokens = [None if x is None else to_chunks(x, chunk_size, dtype) for x in (q, k, v, eta, log_decay, log_momentum)]
    numbers = 3 * sum(s.numel() for s in running) + 30 * q[:, :chunk_size].numel()
    return in_groups(partial(_group, normalized), [*tokens, full], rest or (), running, numbers * dtype.itemsize)


def _group(normalized: bool, tokens: list[Any], rest: list[Any], running: Matrices) -> tuple[Tensor, Matrices]:
    """Some of the chunks, one after the other. rest: as in WholeChunks, empty for None."""
    shape = running[0].shape[:2]
    *tokens, full = tokens
    here = [None if x is None else x.flatten(1, 2).contiguous() for x in tokens]  # (N, R, C, ...)
    matrices = len(running) // (1 if here[-1] is None else 2)
    flat, running = _per_row(tuple(rest) or None, running), [x.flatten(0, 1) for x in running]
    full = None if full is None else full.repeat_interleave(shape[1], 1)
    outputs = []
    for n, part in enumerate(prepare(here, flat, matrices == 2, normalized).unbind()):
        y, after = advance(part, flat, running[:matrices], running)
        running = pick(None if full is None else full[n], after, running)
        outputs.append(y)
    return from_chunks(torch.stack(outputs).unflatten(1, shape)), [x.unflatten(0, shape) for x in running]


def _per_row(rest: tuple[Tensor, ...] | None, running: Matrices) -> Matrices | None:
    """(H, F, V) -> (B H, F, V)."""
    return None if rest is None else [w.expand(len(running[0]), *w.shape).flatten(0, 1) for w in rest]
