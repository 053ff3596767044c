"""The selective scan in chunks: token t of all chunks at once, then one state between chunks (README.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.ops.groups import in_groups


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same numbers as reference.selective_scan for every chunk_size; shapes and results as there."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        B, T, E = x.shape
        h = x.new_zeros(B, E, rate.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
        if not T:
            return x, h
        size = min(chunk_size, T)
        tokens = [_chunks(z, size, dtype) for z in (x, step, write, read)]
        numbers = 6 * size * h.numel()
        y, (h,) = in_groups(_group, tokens, (rate.to(dtype),), [h], numbers * h.element_size())
        return y[:, :T].to(x.dtype), h


def _chunks(z: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, T, F) -> (N, B, C, F), zeros behind the last token: a step of zero neither decays nor writes."""
    return F.pad(z, (0, 0, 0, -z.shape[1] % size)).to(dtype).unflatten(1, (-1, size)).transpose(0, 1)


def _group(tokens: list[Any], fixed: list[Any], state: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Some of the chunks (N, B, C, ...): y (B, N C, E) and the state after them."""
    (x, step, write, read), (rate,), (h,) = tokens, fixed, state
    inputs = (step * x).unbind(2)
    own = torch.zeros_like(h)  # what a chunk has written by itself: (N, B, E, S)
    outputs = []
    for t, (size, new, w, r) in enumerate(zip(step.unbind(2), inputs, write.unbind(2), read.unbind(2), strict=True)):
        written = new[..., None] * w[..., None, :]
        own = torch.addcmul(written, torch.exp(-size[..., None] * rate), own) if t else written
        outputs.append((own @ r[..., None])[..., 0])
    passed = step.cumsum(2)  # (N, B, C, E)
    kept = torch.exp(-passed[:, :, -1, :, None] * rate)
    starts = []
    for end, keep in zip(own.unbind(), kept.unbind(), strict=True):
        starts.append(h)
        h = torch.addcmul(end, keep, h)
    left = torch.exp(-passed[..., None] * rate) * torch.stack(starts)[:, :, None]  # (N, B, C, E, S)
    y = torch.stack(outputs, 2) + (left @ read[..., None])[..., 0]
    return y.transpose(0, 1).flatten(1, 2), [h]
