"""Linear attention in chunks: a C x C product inside each chunk, one state between chunks (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same numbers as reference.linear_attention for every chunk_size; shapes and results as there."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        T = v.shape[1]
        size = min(chunk_size, max(T, 1))
        q, k, x = (_chunks(y.to(dtype), size) for y in (q, k, v))  # (B, H, N, C, *)
        g = k.new_zeros(k.shape[:-1])
        if log_decay is not None:
            g = _chunks(log_decay.to(dtype)[..., None], size)[..., 0].cumsum(-1)  # (B, H, N, C)
        o = (q @ k.mT * _decay_matrix(g)) @ x
        written = (k * (g[..., -1:] - g).exp()[..., None]).mT @ x  # (B, H, N, K, V)
        kept = g[..., -1, None, None].exp()
        M = torch.zeros_like(written[:, :, 0]) if initial_state is None else initial_state.to(dtype)
        starts = []
        for n in range(written.shape[2]):
            starts.append(M)
            M = kept[:, :, n] * M + written[:, :, n]
        o = o + (q * g.exp()[..., None]) @ torch.stack(starts, 2)
        return o.flatten(2, 3)[:, :, :T].transpose(1, 2).to(v.dtype), M


def _chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, D) -> (B, H, N, C, D), at least one chunk; zeros fill the last, which writes nothing."""
    missing = -x.shape[1] % size if x.shape[1] else size
    return F.pad(x, (0, 0, 0, 0, 0, missing)).transpose(1, 2).unflatten(2, (-1, size))


def _decay_matrix(g: Tensor) -> Tensor:
    """exp(g_t - g_s) for s <= t, else 0: (..., C) -> (..., C, C). Only differences <= 0 are exponentiated."""
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    return (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp()
