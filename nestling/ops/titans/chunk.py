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
from torch.utils.checkpoint import checkpoint

from nestling.ops.titans.reference import check
from nestling.ops.titans.writes import Decays, commit, decays, read_memory, written
from nestling.ops.walk import Matrices, pick, walk

KEPT_BYTES = 64 * 2**20  # what the backward pass may find kept; beyond it, groups of chunks are run again


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
        memory = _Memory(weights, decay_to, log_momentum is not None, whole or whole_chunks, v.dtype)
        anchor, running = memory.enter(len(v), state)
        tokens = (q, k, v, eta, torch.zeros_like(eta) if log_decay is None else log_decay, log_momentum)
        y, anchor, running = walk(memory, tokens, anchor, running, count, lengths, chunk_size)
        return y.to(v.dtype), memory.leave(anchor, running)


class _Memory:
    """How `walk` sees it. Anchor and running hold what decays: weights and deviation, or the deviation alone."""

    def __init__(
        self, weights: tuple[Tensor, ...], decay_to: str, momentum: bool, whole: WholeChunks, dtype: torch.dtype
    ) -> None:
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.weights = tuple(w.to(self.dtype) for w in weights)
        self.rest = self.weights if decay_to == "initial" else None
        self.momentum, self.chunks = momentum, whole

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
        q, k, v, *gates = _heads_first(tokens, self.dtype)  # (B, H, C, ...)
        if alive is not None:
            alive = alive[:, None]
            gates = [None if x is None else x.masked_fill(~alive, 0) for x in gates]
        eta, log_decay, log_momentum = gates
        by = decays(log_decay, log_momentum, alive)
        writes = written(k, v, eta[..., None], _weights(self.rest, anchor))
        states = _stack(running, 2 if self.momentum else 1)
        y = read_memory(q, states, self.rest, writes, by)
        states = [commit(s, *w, by) for s, w in zip(states, writes, strict=True)]
        return y.transpose(1, 2), _unstack(states)

    def whole(self, tokens: Any, running: Matrices, full: Tensor | None, chunk_size: int) -> tuple[Tensor, Matrices]:
        return self.chunks(*tokens, rest=self.rest, running=running, full=full, chunk_size=chunk_size)


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
) -> tuple[Tensor, Matrices]:
    """`WholeChunks` in torch. Past KEPT_BYTES the backward pass runs groups of chunks again from their first states."""
    states = _stack(running, 1 if log_momentum is None else 2)
    chunks, size, outputs = q.shape[1] // chunk_size, _group(q, states, chunk_size), []
    again = size < chunks and torch.is_grad_enabled()
    for start in range(0, chunks, size):
        part = slice(start * chunk_size, (start + size) * chunk_size)
        tokens = [None if x is None else x[:, part] for x in (q, k, v, eta, log_decay, log_momentum)]
        arguments = tokens, rest, states, None if full is None else full[start : start + size], chunk_size
        run = partial(checkpoint, _chunks, use_reentrant=False, preserve_rng_state=False) if again else _chunks
        y, states = run(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 1), _unstack(states)


def _group(q: Tensor, states: Matrices, chunk_size: int) -> int:
    """How many chunks autograd may keep: per chunk about three times its states and thirty times its tokens."""
    numbers = 3 * sum(s.numel() for s in states) + 30 * q[:, :chunk_size].numel()
    return max(KEPT_BYTES // (numbers * states[0].element_size()), 1)


def _chunks(
    tokens: list[Any],
    rest: tuple[Tensor, ...] | None,
    states: Matrices,
    full: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Matrices]:
    """One group: what each chunk writes, one after the other, then all reads at once."""
    cut = [None if x is None else x.unflatten(1, (-1, chunk_size)) for x in tokens]
    q, k, v, eta, log_decay, log_momentum = _heads_first(cut, states[0].dtype)  # (B, H, N, C, ...)
    by = decays(log_decay, log_momentum)
    per_chunk = zip(*(x.unbind(2) for x in (k, v, eta[..., None], *by)), strict=True)
    starts, writes = [], []
    for n, (k_n, v_n, eta_n, *by_n) in enumerate(per_chunk):
        made = written(k_n, v_n, eta_n, _weights(rest, [s[:, :, 0] for s in states]))
        starts.append(states)
        writes.append(made)
        after = [commit(s, *w, Decays(*by_n)) for s, w in zip(states, made, strict=True)]
        states = pick(None if full is None else full[n], after, states)
    firsts = [torch.stack(x, 2) for x in zip(*starts, strict=True)]  # (B, H, N, S, F, V)
    joined = [
        (torch.stack(f, 2), torch.stack(e, 2)) for f, e in (zip(*w, strict=True) for w in zip(*writes, strict=True))
    ]
    y = read_memory(q, firsts, None if rest is None else tuple(w[:, None] for w in rest), joined, by)
    return y.flatten(2, 3).transpose(1, 2), states


def _heads_first(tokens: Any, dtype: torch.dtype) -> list[Any]:
    """(B, T, H, K) and (B, T, H) -> (B, H, T, ...), None for None."""
    return [None if x is None else x.to(dtype).movedim(-2 if i < 3 else -1, 1) for i, x in enumerate(tokens)]


def _weights(rest: tuple[Tensor, ...] | None, decaying: Matrices) -> Matrices:
    return decaying if rest is None else [w + m for w, m in zip(rest, decaying, strict=True)]


def _stack(running: Matrices, per_matrix: int) -> Matrices:
    """(M..., S...) -> one (B, H, S, F, V) per matrix, S = per_matrix."""
    matrices = len(running) // per_matrix
    return [torch.stack(running[i::matrices], 2) for i in range(matrices)]


def _unstack(states: Matrices) -> Matrices:
    return [x for parts in zip(*(s.unbind(2) for s in states), strict=True) for x in parts]
