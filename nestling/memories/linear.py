"""Memories that erase what they overwrite: a matrix per head, written at every token by the error of its answer.

layer             paper                        decay                 op
DeltaRule         DeltaNet, 2406.06484         none                  delta_rule
GatedDeltaRule    Gated DeltaNet, 2412.06464   chosen by the token   gated_delta_rule
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.frame import DecayGate, Frame, TokenGates, is_real, static_level
from nestling.ops import dispatch


@state_class
class LinearState:
    """One row per sequence."""

    tail: Tensor  # (B, width-1, 2D + values) last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


class LinearLayer(nn.Module, ABC):
    """Frame, matrix memory that starts empty, frame. `y, state = layer(x, state=None, lengths=None)`.

    chunk_size changes the speed and not the numbers.
    """

    def __init__(self, frame: Frame, chunk_size: int) -> None:
        super().__init__()
        check_chunk(chunk_size)
        self.chunk_size, self.frame = chunk_size, frame
        self.gates = TokenGates(frame.dim, frame.heads, beta=0.5)

    def forward(
        self, x: Tensor, state: LinearState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        q, k, v, tail = self.frame.enter(x, None if state is None else state.tail, lengths)
        real = is_real(x, lengths)
        if real is not None:  # a zero key writes nothing
            k = k * real[..., None]
        beta = self.gates(x)["beta"].exp()
        o, M = self.recur(x, q, k, v, beta, None if state is None else state.memory, real)
        return self.frame.leave(o, x), LinearState(tail, M)

    @abstractmethod
    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, M: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Write and read every token: o (B, T, H, V) and the new M. real (B, T, 1) or None = all."""

    def half_life(self) -> float | None:
        """Tokens until an unwritten memory has halved, in the head that keeps longest; None = never."""
        return None

    def levels(self) -> list[Level]:
        """The memory, and the projections around it."""
        H, V = self.frame.norm.shape
        memory = matrix_level("L2 regression", H * self.frame.width * V, self.half_life(), self.frame.tail_bytes())
        return [memory, static_level(self, 0)]


class DeltaRule(LinearLayer):
    """M <- (I - beta k k^T) M + beta k v^T, beta in (0, 1) chosen by the token (65)."""

    def __init__(self, dim: int, heads: int, chunk_size: int = 64, *, expansion: int = 1) -> None:
        """expansion: width of a value / width of a key."""
        super().__init__(Frame(dim, heads, expansion=expansion, gated=False), chunk_size)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, M: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return dispatch.delta_rule(q, k, v, beta, initial_state=M, chunk_size=self.chunk_size)


class GatedDeltaRule(LinearLayer):
    """The delta rule on alpha M; what is read is gated. beta and alpha in (0, 1) are chosen by the token.

    DEVIATION: keys are as wide as dim / heads; the published models give them three quarters of that.
    """

    def __init__(self, dim: int, heads: int, chunk_size: int = 64, *, expansion: int = 1) -> None:
        """expansion: width of a value / width of a key, 2 in the published models."""
        super().__init__(Frame(dim, heads, expansion=expansion), chunk_size)
        self.decay = DecayGate(dim, heads)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, M: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        g = self.decay(x) if real is None else self.decay(x) * real  # a zero log decay forgets nothing
        return dispatch.gated_delta_rule(q, k, v, beta, g, initial_state=M, chunk_size=self.chunk_size)

    def half_life(self) -> float:
        return float(math.log(0.5) / self.decay.at_rest().max())


def check_chunk(chunk_size: int) -> None:
    """Raises ValueError below one token."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")


def matrix_level(objective: str, numbers: int, half_life: float | None, beside: int) -> Level:
    """The level of a matrix of `numbers` entries that starts empty and is written by every token; beside: in bytes."""
    return Level(
        name="memory",
        memory="matrix",
        objective=objective,
        rule="gradient descent",
        clock="token",
        period=1,
        parameters=0,
        half_life=half_life,
        transfer="none",
        state_bytes=4 * numbers + beside,
    )
