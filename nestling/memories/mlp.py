"""A memory trained by gradient descent on the tokens it reads, chunk by chunk: test-time training (TTT)."""

from __future__ import annotations

from typing import Literal

from nestling.memories.chunked import ChunkedMemory


class TTTMemory(ChunkedMemory):
    """A 2-layer residual MLP, or a matrix, written by plain gradient descent: Titans without momentum and forgetting.

        M_t = M_{t-1} - eta_t grad 1/2 |M_a(k_t) - v_t|^2,   y_t = M_t(q_t)        a = last token before t's chunk

    DEVIATION: TTT normalises inside its residual memory; ours is (89), with unit-norm keys instead.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: int = 2,
        chunk_size: int = 16,
        *,
        memory: Literal["mlp", "linear"] = "mlp",
        eta_max: float = 1.0,
    ) -> None:
        """expansion: hidden width / head width of the MLP memory; eta_max: bound of a chunk's summed write rate."""
        super().__init__(
            dim,
            heads,
            expansion,
            chunk_size,
            memory=memory,
            eta_max=eta_max,
            momentum=None,
            half_life=None,
            decay_to="initial",
        )
