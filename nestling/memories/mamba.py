"""Mamba's selective state space as a memory layer: what Samba puts between its windows of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.frame import check_width, inverse_softplus, is_real, log_uniform, memory_dtype, static_level
from nestling.memories.linear import check_chunk, matrix_level
from nestling.memories.projections import ShortConvolution
from nestling.ops import dispatch


@state_class
class MambaState:
    """One row per sequence."""

    tail: Tensor  # (B, width-1, E) last inputs of the convolution
    memory: Tensor  # (B, E, N)


class Mamba(nn.Module):
    """h_t = exp(-step_t rate) * h_{t-1} + step_t x_t write_t^T, y_t = W_o (silu(z_t) * (h_t read_t + skip * x_t)).

    Step, write and read are chosen by the token. `y, state = layer(x, state=None, lengths=None)`; chunk_size changes
    the speed and not the numbers. Starts as published: rates 1 .. N, steps log-uniform in [0.001, 0.1].
    """

    def __init__(self, dim: int, chunk_size: int = 64, *, expansion: int = 2, states: int = 16) -> None:
        """expansion: channels / dim; states: N, numbers kept per channel."""
        super().__init__()
        check_chunk(chunk_size)
        for name, size in {"expansion": expansion, "states": states}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; use at least 1")
        self.dim, self.channels, self.states, self.chunk_size = dim, expansion * dim, states, chunk_size
        self.rank = math.ceil(dim / 16)
        self.project_in = nn.Linear(dim, 2 * self.channels, bias=False)
        self.conv = ShortConvolution(self.channels)
        self.project_chosen = nn.Linear(self.channels, self.rank + 2 * states, bias=False)
        self.project_step = nn.Linear(self.rank, self.channels)
        # Vectors, not matrices: rules such as "decay what has two dimensions" must not touch them.
        self.log_rate = nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(self.channels))
        self.skip = nn.Parameter(torch.ones(self.channels))
        self.project_out = nn.Linear(self.channels, dim, bias=False)
        with torch.no_grad():
            self.project_step.bias.copy_(inverse_softplus(log_uniform(self.channels, 1e-3, 1e-1)))

    def forward(
        self, x: Tensor, state: MambaState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        check_width(x, self.dim)
        dtype, real = memory_dtype(x), is_real(x, lengths)
        mixed, z = self.project_in(x).chunk(2, dim=-1)
        mixed, tail = self.conv(mixed, None if state is None else state.tail, lengths)
        chosen, write, read = self.project_chosen(mixed).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.project_step(chosen).to(dtype))
        if real is not None:  # a step of zero neither writes nor forgets
            step = step * real
        rate = self.log_rate.to(dtype).exp().view(self.channels, self.states)
        o, memory = dispatch.selective_scan(
            mixed.to(dtype),
            step,
            rate,
            write.to(dtype),
            read.to(dtype),
            initial_state=None if state is None else state.memory,
            chunk_size=self.chunk_size,
        )
        y = (o + self.skip * mixed).to(x.dtype) * F.silu(z)
        return self.project_out(y), MambaState(tail, memory)

    def half_life(self) -> float:
        """Tokens until the number that keeps longest has halved, at a token that says nothing."""
        step = F.softplus(self.project_step.bias.detach().double())
        slowest = step[:, None] * self.log_rate.detach().double().exp().view(self.channels, self.states)
        return math.log(2) / float(slowest.min())

    def levels(self) -> list[Level]:
        """The memory, and the projections around it."""
        tail = 4 * (self.conv.width - 1) * self.channels
        memory = matrix_level("dot product", self.channels * self.states, self.half_life(), tail)
        return [memory, static_level(self, 0)]
