"""What token memories share before and after their own arithmetic: short convolution, unit norm, heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 2**20  # numbers; the C library keeps memory of this size for whoever asks next, and gives 32 MiB back at once


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the last `width` tokens, with a carried tail.

        y_t = act(sum_j weight[j] * x_{t-width+1+j}) [+ x_t]

    `activation` applies SiLU; `residual` adds x after it. Source: [Titans] §4.4 and the paper §8.3, width 4.
    """

    def __init__(self, dim: int, width: int = 4, *, activation: bool = True, residual: bool = False) -> None:
        super().__init__()
        if dim < 1 or width < 1:
            raise ValueError(f"ShortConvolution got dim={dim}, width={width}; both must be at least 1")
        self.dim, self.width, self.activation, self.residual = dim, width, activation, residual
        self.weight = nn.Parameter(torch.empty(width, dim))  # weight[-1] multiplies the current token
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, tail: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) → y (B, T, D) and the new tail (B, width-1, D): the last real inputs of each row.

        `tail` is what an earlier call returned (None = zeros); `lengths` (B,) counts the real tokens of each row.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, ShortConvolution needs (B, T, {self.dim})")
        before = self.width - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], before, self.dim)
        joined = torch.cat([tail.to(x.dtype), x], dim=1)  # (B, width-1+T, D)
        taps = self.weight.to(x.dtype)
        y = x * taps[before]
        for j in range(before):  # shifted products: a third faster on CPU than a grouped conv1d
            y = torch.addcmul(y, joined[:, j : j + x.shape[1]], taps[j])
        y = F.silu(y) if self.activation else y
        return (y + x if self.residual else y), last_real(joined, before, lengths, x.shape[1])


def last_real(joined: Tensor, count: int, lengths: Tensor | None, tokens: int) -> Tensor:
    """The `count` entries before row b's end, joined[b, n : n+count], n = lengths[b]; joined (B, count+tokens, D)."""
    if lengths is None:
        return joined[:, tokens:]
    index = lengths.to(joined.device)[:, None] + torch.arange(count, device=joined.device)
    return joined.gather(1, index[..., None].expand(-1, -1, joined.shape[-1]))


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|² + eps) over the last dimension: length one, and a finite gradient at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H*K) → (B, T, H, K)."""
    return x.unflatten(-1, (heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """(B, T, H, K) → (B, T, H*K)."""
    return x.flatten(-2)


def rotary(positions: Tensor, width: int, dtype: torch.dtype, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, width / 2) that turn pairs of channels by angles that grow with the position.

    Made in float64 at every call: a buffer would lose its precision, and so every position, in model.bfloat16().
    """
    channels = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angle = positions.unsqueeze(-1) * base ** (-channels / width)
    return angle.cos().to(dtype).unsqueeze(2), angle.sin().to(dtype).unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, K), turned; a product of two turned vectors depends on the difference of their positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def blocks(x: Tensor) -> Sequence[Tensor]:
    """x (B, T, D) cut along T into blocks of at most BLOCK numbers; one block on other devices than a CPU."""
    if x.device.type != "cpu":
        return (x,)
    return x.split(max(1, BLOCK // max(1, len(x) * x.shape[2])), 1)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Blocks (B, t, ...) as one tensor (B, T, ...)."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)
