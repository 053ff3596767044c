"""Linear memories as layers: a matrix per head, written at every token by one of four rules.

layer             objective       decay                 op
LinearAttention   dot product     none                  linear_attention
Retention         dot product     fixed per head        linear_attention
DeltaRule         L2 regression   none                  delta_rule
GatedDeltaRule    L2 regression   chosen by the token   gated_delta_rule
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.frame import Frame, TokenGates, is_real, memory_dtype, static_level
from nestling.ops import dispatch


@state_class
class LinearState:
    """One row per sequence."""

    tail: Tensor  # (B, width-1, 3D) last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


class LinearLayer(nn.Module, ABC):
    """Frame, matrix memory with a learned initial state, frame. `y, state = layer(x, state=None, lengths=None)`.

    chunk_size changes the speed and not the numbers.
    """

    objective: str
    gates: TokenGates | None

    def __init__(self, dim: int, heads: int, chunk_size: int = 64) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
        self.chunk_size = chunk_size
        self.frame = Frame(dim, heads)
        self.initial = nn.Parameter(torch.zeros(heads, self.frame.width, self.frame.width))

    def forward(
        self, x: Tensor, state: LinearState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        q, k, v, tail = self.frame.enter(x, None if state is None else state.tail, lengths)
        M = self.initial.to(memory_dtype(x)).expand(len(x), -1, -1, -1) if state is None else state.memory
        real = is_real(x, lengths)
        gates = {} if self.gates is None else self.gates(x)
        if real is not None:  # a zero key writes nothing, a zero log decay forgets nothing
            k, gates = k * real[..., None], {name: gate * real for name, gate in gates.items()}
        o, M = self.recur(q, k, v, M, gates, real)
        return self.frame.leave(o, x), LinearState(tail, M)

    @abstractmethod
    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, M: Tensor, gates: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Write and read every token: o (B, T, H, V) and the new M. gates are logarithms; real (B, T, 1) or None."""

    def half_life(self) -> float | None:
        """Tokens until an unwritten memory has halved, the mean over heads at a neutral gate; None = never."""
        return None

    def levels(self) -> list[Level]:
        """The memory, and the projections around it."""
        numel = self.initial.numel()
        memory = Level(
            name="memory",
            memory="matrix",
            objective=self.objective,
            rule="gradient descent",
            clock="token",
            period=1,
            parameters=numel,
            half_life=self.half_life(),
            transfer="initialisation (meta-learned)",
            state_bytes=4 * numel + self.frame.tail_bytes(),
        )
        return [memory, static_level(self, numel)]


class LinearAttention(LinearLayer):
    """M <- M + k v^T: Hebbian, nothing is erased or forgotten (14)-(18)."""

    objective = "dot product"

    def __init__(self, dim: int, heads: int, chunk_size: int = 64) -> None:
        super().__init__(dim, heads, chunk_size)
        self.gates = None

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, M: Tensor, gates: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return dispatch.linear_attention(q, k, v, initial_state=M, chunk_size=self.chunk_size)


class Retention(LinearLayer):
    """M <- alpha_h M + k v^T with alpha_h = 1 - 2^(-5-h), spread to 2^-12 over the heads: the RetNet row of (64)."""

    objective = "dot product"

    def __init__(self, dim: int, heads: int, chunk_size: int = 64) -> None:
        super().__init__(dim, heads, chunk_size)
        self.gates = None
        rates = torch.exp2(-torch.linspace(5, 12, heads, dtype=torch.float64))
        self.register_buffer("log_decay", torch.log1p(-rates), persistent=False)
        self.log_decay: Tensor

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, M: Tensor, gates: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decay = self.log_decay.to(k.dtype).expand(k.shape[:3])
        decay = decay if real is None else decay * real
        return dispatch.linear_attention(q, k, v, decay, initial_state=M, chunk_size=self.chunk_size)

    def half_life(self) -> float:
        """The longest: RetNet's heads are spread on purpose."""
        return float(math.log(0.5) / self.log_decay.max())


class DeltaRule(LinearLayer):
    """M <- (I - beta k k^T) M + beta k v^T, beta in (0, 1) chosen by the token (65)."""

    objective = "L2 regression"

    def __init__(self, dim: int, heads: int, chunk_size: int = 64) -> None:
        super().__init__(dim, heads, chunk_size)
        self.gates = TokenGates(dim, heads, beta=0.5)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, M: Tensor, gates: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return dispatch.delta_rule(q, k, v, gates["beta"].exp(), initial_state=M, chunk_size=self.chunk_size)


class GatedDeltaRule(LinearLayer):
    """The delta rule on alpha M; beta and alpha in (0, 1) are chosen by the token.

    half_life: of the memory at initialisation, in tokens; alpha acts on the whole matrix, initial state included.
    """

    objective = "L2 regression"

    def __init__(self, dim: int, heads: int, chunk_size: int = 64, *, half_life: float = 2048) -> None:
        super().__init__(dim, heads, chunk_size)
        if half_life <= 0:
            raise ValueError(f"half_life is {half_life}; use a positive number of tokens")
        self.gates: TokenGates = TokenGates(dim, heads, beta=0.5, alpha=0.5 ** (1 / half_life))

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, M: Tensor, gates: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        beta, g = gates["beta"].exp(), gates["alpha"]
        return dispatch.gated_delta_rule(q, k, v, beta, g, initial_state=M, chunk_size=self.chunk_size)

    def half_life(self) -> float:
        return float(math.log(0.5) / self.gates.at_rest("alpha").log().mean())
