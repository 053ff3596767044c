"""Titans' neural long-term memory as a layer: surprise, momentum, forgetting ([Titans] section 3)."""

from __future__ import annotations

from typing import Literal

from nestling.memories.chunked import ChunkedMemory


class TitansMemory(ChunkedMemory):
    """A memory per head that is written by its own surprise. `y, state = layer(x, state=None, lengths=None)`.

        S_t = mu_t S_{t-1} - eta_t grad 1/2 |M_a(k_t) - v_t|^2        a = last token before t's chunk
        M_t = M_0 + alpha_t (M_{t-1} - M_0) + S_t,   y_t = M_t(q_t)

    The gates eta, alpha, mu are sigmoids of the token; M is a 2-layer residual MLP or a matrix.
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
        momentum: float = 0.5,
        half_life: float = 2048,
        decay_to: Literal["initial", "zero"] = "initial",
    ) -> None:
        """expansion: hidden width / head width of the MLP memory; eta_max: bound of a chunk's summed write rate;
        momentum: mu at initialisation; half_life: in tokens, at initialisation; decay_to: where forgetting leads,
        "zero" is the printed rule, which erases the initial weights too."""
        super().__init__(
            dim,
            heads,
            expansion,
            chunk_size,
            memory=memory,
            eta_max=eta_max,
            momentum=momentum,
            half_life=half_life,
            decay_to=decay_to,
        )
