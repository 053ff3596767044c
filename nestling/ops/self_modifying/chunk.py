"""Self-modifying Titans in chunks: one Python loop over chunks, everything inside a chunk in parallel.

The generated k, v, eta, alpha and all gradients are taken at the chunk's anchor, so inside a chunk each matrix
follows a linear recurrence, solved exactly by one unit-triangular system (README.md). `ops/walk.py` cuts the call into
the rest of an open chunk, whole chunks, and the beginning of the next; one_layer.py and two_layer.py do the chunks.
"""

from __future__ import annotations

from torch import Tensor

from nestling.ops.self_modifying.one_layer import OneLayer, Writer
from nestling.ops.self_modifying.rule import Rule
from nestling.ops.self_modifying.two_layer import TwoLayer
from nestling.ops.self_modifying.writes import Matrices
from nestling.ops.walk import Tokens, walk


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
    rows = len(z)
    anchor = memories.enter(rows, None if state is None else state[: len(weights)])
    running = anchor if state is None else memories.enter(rows, state[len(weights) :])
    y, anchor, running = walk(_Walked(memories), (z, q), anchor, running, count, lengths, chunk_size)
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


class _Walked:
    """The memories as `walk` sees them: tokens are z and q or None, time second."""

    def __init__(self, memories: OneLayer | TwoLayer) -> None:
        self.memories = memories

    def step(
        self, tokens: Tokens, anchor: Matrices, running: Matrices, alive: Tensor | None
    ) -> tuple[Tensor, Matrices]:
        y, running = self.memories.step(*_heads_first(tokens), anchor, running, alive)
        return y.transpose(1, 2), running

    def whole(self, tokens: Tokens, running: Matrices, full: Tensor | None, chunk_size: int) -> tuple[Tensor, Matrices]:
        y, running = self.memories.whole(*_heads_first(tokens), running, full, chunk_size)
        return y.transpose(1, 2), running


def _heads_first(tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    z, q = tokens
    assert z is not None
    return z.transpose(1, 2), None if q is None else q.transpose(1, 2)  # (B, H, C, K)
