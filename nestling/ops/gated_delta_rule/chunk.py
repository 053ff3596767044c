"""The gated delta rule in chunks: one unit-triangular system per chunk gives all its writes at once (README.md)."""

from __future__ import annotations

from torch import Tensor

from nestling.ops.delta_chunks import delta_chunks


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same numbers as reference.gated_delta_rule for every chunk_size; shapes and results as there."""
    return delta_chunks(q, k, v, beta, g, initial_state, chunk_size)
