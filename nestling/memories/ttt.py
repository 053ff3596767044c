"""A memory trained by gradient descent on the tokens it reads, chunk by chunk: test-time training, arXiv 2407.04620."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.frame import TokenGates, check_width, head_width, memory_dtype, static_level
from nestling.memories.projections import ShortConvolution, merge_heads, rotary, rotate, split_heads
from nestling.ops import dispatch


@state_class
class TTTState:
    """One row per sequence; as large after one token as after a million."""

    tail: Tensor  # (B, width-1, 2D) last inputs of the convolutions
    anchor: list[Tensor]  # (B, H, in, out) each: deviations from the initial weights at the last chunk border
    running: list[Tensor]  # the same after the last token
    count: Tensor  # (B,) int64, tokens in the open chunk


class TTTMemory(nn.Module):
    """TTT-Linear (memory="linear") and TTT-MLP, with the projections of the paper's Mamba backbone.

        M_t = M_{t-1} - eta_t grad 1/2 |f(M_a; k_t) - v_t|^2,   y_t = f(M_t; q_t)      a = last token before t's chunk
        f(M; z) = z + LN(g(M; z)),   eta_t = rate sigmoid(w x_t) / (width chunk_size)

    q and k are one projection behind two convolutions, rotated by their place in the chunk; y is normed and gated.
    `y, state = layer(x, state=None, lengths=None)`. DEVIATION: the published code divides token t's sum of gradients by
    t, with a learned correction, where this one divides by chunk_size: the same at each chunk's end.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: int = 4,
        chunk_size: int = 16,
        *,
        memory: Literal["mlp", "linear"] = "mlp",
        rate: float | None = None,
    ) -> None:
        """expansion: hidden width / head width of the MLP; rate: of a chunk, None = as published: 1, MLP 0.1."""
        super().__init__()
        if memory not in ("mlp", "linear"):
            raise ValueError(f'memory={memory!r}; use "mlp" or "linear"')
        rate = {"mlp": 0.1, "linear": 1.0}[memory] if rate is None else rate
        for name, size in {"expansion": expansion, "chunk_size": chunk_size, "rate": rate}.items():
            if size <= 0:
                raise ValueError(f"{name} is {size}; use a positive number")
        self.dim, self.heads, self.width = dim, heads, head_width(dim, heads)
        self.chunk_size, self.memory, self.rate = chunk_size, memory, rate
        width, hidden = self.width, expansion * self.width
        self.project_qk, self.project_v, self.project_gate, self.project_out = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.conv = ShortConvolution(2 * dim, activation=False)
        shapes = {"linear": [(width, width)], "mlp": [(width, hidden), (hidden, width)]}[memory]
        self.initial = nn.ParameterList(nn.Parameter(_with_bias(heads, *shape)) for shape in shapes)
        # Vectors, not matrices: rules such as "decay what has two dimensions" must not touch them.
        self.memory_scale, self.memory_shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.gates = TokenGates(dim, heads, eta=0.5)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self, x: Tensor, state: TTTState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, TTTState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        check_width(x, self.dim)
        dtype = memory_dtype(x)
        count = x.new_zeros(len(x), dtype=torch.long) if state is None else state.count
        shared = self.project_qk(x)
        mixed, tail = self.conv(torch.cat([shared, shared], -1), None if state is None else state.tail, lengths)
        places = (count[:, None] + torch.arange(x.shape[1], device=x.device)) % self.chunk_size
        cos, sin = rotary(places, self.width, dtype)
        q, k = (rotate(split_heads(z, self.heads).to(dtype), cos, sin) for z in mixed.chunk(2, dim=-1))
        o, new = dispatch.ttt(
            q,
            k,
            split_heads(self.project_v(x), self.heads).to(dtype),
            self.gates(x)["eta"].exp() * (self.rate / (self.width * self.chunk_size)),
            weights=tuple(w.to(dtype) for w in self.initial),
            norm=(self.memory_scale.view(self.heads, -1), self.memory_shift.view(self.heads, -1)),
            state=None if state is None else (*state.anchor, *state.running),
            chunk_size=self.chunk_size,
            count=None if state is None else state.count,
            lengths=lengths,
        )
        y = self.norm(merge_heads(o).to(x.dtype)) * F.gelu(self.project_gate(x), approximate="tanh")
        count = (count + (x.shape[1] if lengths is None else lengths.to(count))) % self.chunk_size
        n = len(self.initial)
        return self.project_out(y), TTTState(tail, list(new[:n]), list(new[n:]), count)

    def levels(self) -> list[Level]:
        """The memory, and the projections around it."""
        numel = sum(w.numel() for w in self.initial)
        memory = Level(
            name="memory",
            memory={"linear": "matrix with a norm", "mlp": "2-layer MLP with a norm"}[self.memory],
            objective="L2 regression",
            rule="gradient descent",
            clock="token",
            period=1,
            parameters=numel,
            half_life=None,
            transfer="initialisation (meta-learned)",
            state_bytes=2 * 4 * numel + 8 + 4 * (self.conv.width - 1) * self.conv.dim,
        )
        return [memory, static_level(self, numel)]


def _with_bias(heads: int, inputs: int, outputs: int) -> Tensor:
    """(heads, inputs + 1, outputs): small weights, and a last row of zeros for the bias."""
    return F.pad(torch.randn(heads, inputs, outputs) * 0.02, (0, 0, 0, 1))
