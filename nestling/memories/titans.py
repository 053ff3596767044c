"""Titans' neural long-term memory as a layer: surprise, momentum, forgetting ([Titans] section 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.chunked import KeyValueMemory, KeyValueState
from nestling.memories.frame import Frame, static_level


@state_class
class TitansState:
    """One row per sequence."""

    tail: Tensor  # (B, width-1, 3D) last inputs of the convolution
    memory: KeyValueState


class TitansMemory(nn.Module):
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
        momentum: float | None = 0.5,
        half_life: float | None = 2048,
        decay_to: Literal["initial", "zero"] = "initial",
        gated: bool = True,
    ) -> None:
        """expansion: hidden width / head width of the MLP memory; eta_max: bound of a chunk's summed write rate;
        momentum: mu at initialisation, None = no momentum; half_life: in tokens, at initialisation, None = nothing is
        forgotten; decay_to: where forgetting leads, "zero" is the printed rule: it erases the initial weights too;
        gated: whether the token scales what is read."""
        super().__init__()
        self.frame = Frame(dim, heads, gated=gated)
        self.memory = KeyValueMemory(
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

    def forward(
        self, x: Tensor, state: TitansState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        q, k, v, tail = self.frame.enter(x, None if state is None else state.tail, lengths)
        o, memory = self.memory(x, q, k, v, None if state is None else state.memory, lengths)
        return self.frame.leave(o, x), TitansState(tail, memory)

    def levels(self) -> list[Level]:
        """The memory, and the projections around it."""
        level = self.memory.level("memory", beside=self.frame.tail_bytes())
        return [level, static_level(self, level.parameters)]
