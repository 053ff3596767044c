"""Memories that only add: a matrix per head, M <- alpha M + k v^T, nothing is erased (14)-(18), (64).

layer             paper                       decay            positions   what is read is normalised by
LinearAttention   Katharopoulos, 2006.16236   none             none        the sum of the weights
Retention         RetNet, 2307.08621          fixed per head   rotary      its mean and variance in each head
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.frame import check_width, head_width, is_real, memory_dtype, static_level
from nestling.memories.linear import check_chunk, matrix_level
from nestling.memories.projections import merge_heads, rotary, rotate, split_heads
from nestling.ops import dispatch


class LinearAttention(nn.Module):
    """o_t = phi(q_t) M_t / phi(q_t) z_t, M_t = M_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t), phi = elu + 1.

    `y, state = layer(x, state=None, lengths=None)`; the state is [M | z], (B, H, K, V + 1): z is what a value of 1
    writes. DEVIATION: no positions; the paper adds them to the embeddings.
    """

    def __init__(
        self, dim: int, heads: int, chunk_size: int = 64, *, expansion: int = 1, normalise: bool = True
    ) -> None:
        """expansion: width of a value / width of a key; normalise: divide by phi(q) z, else norm each head."""
        super().__init__()
        check_chunk(chunk_size)
        self.dim, self.heads, self.width, self.chunk_size = dim, heads, head_width(dim, heads), chunk_size
        self.normalise, self.values = normalise, expansion * self.width
        self.project_qk = nn.Linear(dim, 2 * dim, bias=False)
        self.project_v = nn.Linear(dim, heads * self.values, bias=False)
        self.project_out = nn.Linear(heads * self.values, dim, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        check_width(x, self.dim)
        dtype, real = memory_dtype(x), is_real(x, lengths)
        q, k = (F.elu(split_heads(z, self.heads).to(dtype)) + 1 for z in self.project_qk(x).chunk(2, dim=-1))
        v = split_heads(self.project_v(x), self.heads).to(dtype)
        if real is not None:
            k = k * real[..., None]
        if self.normalise:
            v = F.pad(v, (0, 1), value=1.0)
        o, state = dispatch.linear_attention(q, k, v, initial_state=state, chunk_size=self.chunk_size)
        o = o[..., :-1] / (o[..., -1:] + 1e-6) if self.normalise else F.rms_norm(o, o.shape[-1:], eps=1e-5)
        return self.project_out(merge_heads(o).to(x.dtype)), state

    def levels(self) -> list[Level]:
        """The memory, and the projections around it."""
        numbers = self.dim * (self.values + self.normalise)
        return [matrix_level("dot product", numbers, None, 0), static_level(self, 0)]


@state_class
class RetentionState:
    """One row per sequence."""

    memory: Tensor  # (B, H, K, V)
    position: Tensor  # (B,) int64, tokens read


class Retention(nn.Module):
    """M_t = alpha_h M_{t-1} + k_t v_t^T, o_t = q_t M_t, y_t = W_o (swish(W_g x_t) * norm(o_t)), q and k rotated.

    `y, state = layer(x, state=None, lengths=None)`. alpha_h = 1 - 2^(-5-h) for 8 heads, as published.
    DEVIATION: for another number of heads the exponents are spread over the same range, 5 to 12.
    """

    def __init__(self, dim: int, heads: int, chunk_size: int = 64, *, expansion: int = 2) -> None:
        """expansion: width of a value / width of a key."""
        super().__init__()
        check_chunk(chunk_size)
        self.dim, self.heads, self.width, self.chunk_size = dim, heads, head_width(dim, heads), chunk_size
        self.values = expansion * self.width
        self.project_qk = nn.Linear(dim, 2 * dim, bias=False)
        self.project_v = nn.Linear(dim, heads * self.values, bias=False)
        self.project_gate = nn.Linear(dim, heads * self.values, bias=False)
        self.project_out = nn.Linear(heads * self.values, dim, bias=False)

    def log_decay(self, device: torch.device | None = None) -> Tensor:
        """(H,) log alpha_h; made at every call, because a buffer would be rounded in model.bfloat16()."""
        rates = torch.exp2(-torch.linspace(5, 12, self.heads, dtype=torch.float64, device=device))
        return torch.log1p(-rates)

    def forward(
        self, x: Tensor, state: RetentionState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, RetentionState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        check_width(x, self.dim)
        dtype, real = memory_dtype(x), is_real(x, lengths)
        start = x.new_zeros(len(x), dtype=torch.long) if state is None else state.position
        cos, sin = rotary(start[:, None] + torch.arange(x.shape[1], device=x.device), self.width, dtype)
        q, k = (split_heads(z, self.heads).to(dtype) for z in self.project_qk(x).chunk(2, dim=-1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin) * self.width**-0.5
        v = split_heads(self.project_v(x), self.heads).to(dtype)
        decay = self.log_decay(k.device).to(k).expand(k.shape[:3])
        if real is not None:
            k, decay = k * real[..., None], decay * real
        memory = None if state is None else state.memory
        o, memory = dispatch.linear_attention(q, k, v, decay, initial_state=memory, chunk_size=self.chunk_size)
        o = merge_heads(F.layer_norm(o, o.shape[-1:], eps=1e-5)).to(x.dtype)
        position = start + (x.shape[1] if lengths is None else lengths.to(start))
        return self.project_out(o * F.silu(self.project_gate(x))), RetentionState(memory, position)

    def levels(self) -> list[Level]:
        """The memory, and the projections around it. Its half-life is the longest: the heads are spread on purpose."""
        half_life = float(math.log(0.5) / self.log_decay().max())
        return [matrix_level("dot product", self.dim * self.values, half_life, 8), static_level(self, 0)]
