"""Cutting a sequence anywhere, for memories whose chunks define them: an open chunk is carried and read again.

The state is that of the last chunk border plus the inputs since. A call puts those in front of its own, so every chunk
is seen whole and the cuts between calls change nothing. Rows may be at different places of their chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prepend(pending: Tensor, count: Tensor, inputs: Tensor) -> Tensor:
    """Each row's open chunk, left-aligned, before its new inputs: (B, n, D), (B,), (B, T, D) -> (B, n+T, D).

    Row b has count_b + T entries; what follows them repeats its last one.
    """
    rows, tokens = inputs.shape[:2]
    old = pending.shape[1]
    joined = torch.cat([pending.to(inputs.dtype), inputs], 1)
    if old == 0:
        return joined
    place = torch.arange(old + tokens, device=inputs.device).expand(rows, -1)
    source = torch.where(place < count[:, None], place, place + old - count[:, None]).clamp(max=old + tokens - 1)
    return joined.gather(1, source[..., None].expand(-1, -1, joined.shape[-1]))


def take_new(y: Tensor, count: Tensor, tokens: int) -> Tensor:
    """The outputs of the new tokens, y[b, count_b : count_b + tokens]; y (B, n+T, ...)."""
    index = count[:, None] + torch.arange(tokens, device=y.device)
    return y.gather(1, index.view(*index.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:]))


def left_open(joined: Tensor, total: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The inputs after each row's last chunk border, zeros behind them, and how many they are.

    joined (B, N, D) with total (B,) real entries -> (B, n, D), (B,).
    """
    count = total % chunk_size
    longest = int(count.max()) if len(count) else 0
    place = torch.arange(longest, device=joined.device)
    index = ((total - count)[:, None] + place).clamp(max=max(joined.shape[1] - 1, 0))
    pending = joined.gather(1, index[..., None].expand(-1, -1, joined.shape[-1]))
    return pending.masked_fill((place >= count[:, None])[..., None], 0), count
