"""Linear attention in chunks: a C x C product inside each chunk, one state between chunks (README.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.ops.chunks import decay_matrix, from_chunks, to_chunks
from nestling.ops.groups import in_groups


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
        B, T, H, K = k.shape
        M = v.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
        if not T:
            return v, M
        size = min(chunk_size, T)
        tokens = [None if x is None else to_chunks(x, size, dtype) for x in (q, k, v, log_decay)]
        numbers = B * H * (size * (4 * K + 2 * v.shape[-1] + 3 * size) + 3 * K * v.shape[-1])
        o, (M,) = in_groups(_group, tokens, (), [M], numbers * M.element_size())
        return o[:, :T].to(v.dtype), M


def _group(tokens: list[Any], _: list[Any], state: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Some of the chunks (N, B, H, C, ...): o (B, N C, H, V) and the state after them."""
    here: list[Any] = [None if x is None else x.contiguous() for x in tokens]
    q, k, v, g = here
    scores, kept = q @ k.mT, None
    if g is None:
        scores = scores.tril()
    else:
        g = g.cumsum(-1)
        decay, grown = decay_matrix(g), g.exp()
        scores, kept = scores * decay, grown[..., -1, None, None].unbind()
        q, k = q * grown[..., None], k * decay[..., -1, :, None]
    starts, (M,) = [], state
    for n, written in enumerate((k.mT @ v).unbind()):  # (B, H, K, V)
        starts.append(M)
        M = M + written if kept is None else torch.addcmul(written, kept[n], M)
    return from_chunks(scores @ v + q @ torch.stack(starts)), [M]
