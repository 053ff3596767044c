"""Self-modifying Titans in chunks: one Python loop over chunks, everything inside a chunk in parallel.

The generated k, v, eta, alpha and all gradients are taken at the chunk's anchor, so inside a chunk each matrix
follows a linear recurrence, solved exactly by one unit-triangular system (README.md). This file cuts the call into
the rest of an open chunk, whole chunks, and the beginning of the next; one_layer.py and two_layer.py do the chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.alignment import Alignment, align
from nestling.ops.self_modifying.one_layer import OneLayer, Writer
from nestling.ops.self_modifying.rule import Rule
from nestling.ops.self_modifying.two_layer import TwoLayer
from nestling.ops.self_modifying.writes import Matrices, pick


def self_modifying(
    z: Tensor,
    q: Tensor | None,
    weights: tuple[Tensor, ...],
    gate_weight: Tensor,
    gate_bias: Tensor,
    rates: Tensor,
    *,
    rule: Rule,
    chunk_size: int,
    features: Tensor | None = None,
    state: tuple[Tensor, ...] | None = None,
    count: Tensor | None = None,
    lengths: Tensor | None = None,
    writer: Writer | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Let M memories per head generate their keys, values and gates, write themselves, and be read.

    z            (B, T, H, K)  input of the generating memories
    q            (B, T, H, K)  queries, or None: a memory generates them too
    weights      initial states (H, M, in, out): one (linear or feature memory) or two (2-layer MLP); M = 5, 6 without q
    gate_weight  (2, H, K), gate_bias (2, H): the slow heads of eta and alpha
    rates        (H, M)  r: a memory is written with r * eta and keeps alpha^r
    features     (H, K, F)  static first layer: M(z) = Wᵀ unit(silu(featuresᵀ z))
    state        deviations from the initial states, (B, H, M, in, out) each: at the last chunk border (the anchor),
                 then the same after the last token; None = zeros
    count        (B,)  tokens of the chunk that is open, below chunk_size; None = 0
    lengths      (B,)  real tokens per row; the rest is padding
    writer       computes the writes of whole chunks under the default rule (triton.py); None = torch
    Returns y (B, T, H, K) and the new state. One token is a computation of fixed shape without synchronisation.
    Source: (83)-(93); docs/equations.md. Raises ValueError for shapes that do not fit.
    """
    _check(z, q, weights, rates, chunk_size, features)
    gates = gate_weight, gate_bias, rates
    memories: TwoLayer | OneLayer
    if len(weights) == 2:
        memories = TwoLayer(weights, gates, rule)
    else:
        memories = OneLayer(weights[0], features, gates, rule, writer)
    rows, tokens = z.shape[:2]
    anchor = memories.enter(rows, None if state is None else state[: len(weights)])
    running = anchor if state is None else memories.enter(rows, state[len(weights) :])
    if tokens == 1:
        y, anchor, running = _token(memories, z, q, anchor, running, count, lengths, chunk_size)
    else:
        frame = align(z, count, lengths, chunk_size)
        y, anchor, running = _chunks(
            memories, frame.enter(z), None if q is None else frame.enter(q), anchor, running, frame
        )
        y = frame.leave(y)
    return y, (*memories.leave(anchor), *memories.leave(running))


def _check(
    z: Tensor, q: Tensor | None, weights: tuple[Tensor, ...], rates: Tensor, chunk_size: int, features: Tensor | None
) -> None:
    memories = 6 if q is None else 5
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    if len(weights) not in (1, 2) or (len(weights) == 2 and features is not None):
        raise ValueError(f"weights holds {len(weights)} matrices per memory; use 1, or 2 without features")
    if any(w.shape[1] != memories for w in weights) or rates.shape[1] != memories:
        raise ValueError(f"weights and rates must hold {memories} memories (5, and one more where q is None)")
    width = z.shape[-1] if features is None else features.shape[-1]
    if (weights[0].shape[-2], weights[-1].shape[-1]) != (width, z.shape[-1]):
        raise ValueError(f"weights map {weights[0].shape[-2]} to {weights[-1].shape[-1]}, not {width} to {z.shape[-1]}")


def _token(
    memories: OneLayer | TwoLayer,
    z: Tensor,
    q: Tensor | None,
    anchor: Matrices,
    running: Matrices,
    count: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Matrices, Matrices]:
    """One token in every row, whatever its phase: a chunk of one, and a new anchor where it fills the open chunk."""
    written = torch.ones(len(z), dtype=torch.long, device=z.device)
    if lengths is not None:
        written = lengths.to(z.device).clamp(max=1)
    y, running = memories.step(
        z.transpose(1, 2),
        None if q is None else q.transpose(1, 2),
        anchor,
        running,
        None if lengths is None else written[:, None] > 0,
    )
    full = written if count is None else count.to(z.device) + written
    return y.transpose(1, 2), pick(full == chunk_size, running, anchor), running


def _chunks(
    memories: OneLayer | TwoLayer,
    z: Tensor,
    q: Tensor | None,
    anchor: Matrices,
    running: Matrices,
    frame: Alignment,
) -> tuple[Tensor, Matrices, Matrices]:
    """The call's frame, part by part: y (B, frame, H, K), anchor and running matrices."""
    z, q = z.transpose(1, 2), None if q is None else q.transpose(1, 2)  # (B, H, T, K)
    C, alive, outputs = frame.chunk_size, frame.alive(), []

    def step(part: slice) -> Matrices:
        here = None if alive is None else alive[:, part]
        y, grown = memories.step(z[:, :, part], None if q is None else q[:, :, part], anchor, running, here)
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
        whole = slice(begin, end)
        full = _full(frame, begin, end)
        y, E = memories.whole(z[:, :, whole], None if q is None else q[:, :, whole], running, full, C)
        outputs.append(y)
        anchor, running = (E if begin == 0 else pick(frame.full(begin), E, anchor)), E
        if frame.end is not None:
            running = _open(memories, z, q, anchor, running, frame.end, begin, end, C)
    if frame.frame > end:
        running = step(slice(end, frame.frame))
    return (torch.cat(outputs, 2) if outputs else torch.zeros_like(z)).transpose(1, 2), anchor, running


def _full(frame: Alignment, begin: int, end: int) -> Tensor | None:
    """(N, B): the rows that fill each whole chunk between two borders, None where all do."""
    if frame.end is None:
        return None
    borders = torch.arange(begin + frame.chunk_size, end + 1, frame.chunk_size, device=frame.end.device)
    return frame.end >= borders[:, None]


def _open(
    memories: OneLayer | TwoLayer,
    z: Tensor,
    q: Tensor | None,
    anchor: Matrices,
    running: Matrices,
    stop: Tensor,
    begin: int,
    end: int,
    chunk_size: int,
) -> Matrices:
    """The running matrices of the rows that stop (B,) inside the whole chunks: their last chunk once more, in part."""
    start = begin + (stop - begin).clamp(min=0) // chunk_size * chunk_size
    place = start[:, None] + torch.arange(chunk_size, device=z.device)  # (B, C)
    alive = (place < stop[:, None]) & (start < end)[:, None]
    index = place.clamp(max=z.shape[2] - 1)[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3])
    return memories.step(z.gather(2, index), None if q is None else q.gather(2, index), anchor, running, alive)[1]
