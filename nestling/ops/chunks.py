"""A sequence as chunks, and what is left of earlier tokens inside one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def to_chunks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, ...) -> (N, B, H, C, ...), zeros behind the last token, which write nothing and decay nothing."""
    if missing := -x.shape[1] % size:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.to(dtype).unflatten(1, (-1, size)).movedim(3, 1).movedim(2, 0)  # via (B, H, N, C, ...)


def from_chunks(o: Tensor) -> Tensor:
    """(N, B, H, C, V) -> (B, N C, H, V)."""
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)


def decay_matrix(g: Tensor) -> Tensor:
    """exp(g_t - g_s) for s <= t, else 0: (..., C) -> (..., C, C). Only differences <= 0 are exponentiated."""
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    return (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp()
