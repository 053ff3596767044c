"""The windowed update (71) of one linear layer, all tokens at once: two matrix products (README.md)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def cms_update(
    x: Tensor,
    error: Tensor,
    rate: Tensor,
    *,
    period: int,
    reduction: Literal["sum", "mean"] = "sum",
    delta: Tensor | None = None,
    buffer: Tensor | None = None,
    count: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same numbers as reference.cms_update; arguments and results as there."""
    if period < 1 or reduction not in ("sum", "mean"):
        raise ValueError(f'period={period}, reduction={reduction!r}; need period >= 1 and "sum" or "mean"')
    with torch.autocast(x.device.type, enabled=False):
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        delta = x.new_zeros(B, error.shape[-1], x.shape[-1], dtype=dtype) if delta is None else delta.to(dtype)
        buffer = torch.zeros_like(delta) if buffer is None else buffer.to(dtype)
        count = torch.zeros(B, dtype=torch.long, device=x.device) if count is None else count
        real = torch.full_like(count, T) if lengths is None else lengths.to(count)
        total = count + real
        writes, left = total // period, total % period
        place = torch.arange(T, device=x.device)
        border = (writes * period - count)[:, None]  # where the open window begins; <= 0 if none was filled
        scaled = rate.to(dtype).expand(B, T) / (period if reduction == "mean" else 1)
        scaled = scaled.masked_fill(place >= real[:, None], 0)
        closed = _outer(error, x, scaled.masked_fill(place >= border, 0))
        opened = _outer(error, x, scaled.masked_fill(place < border, 0))
        wrote = (writes > 0)[:, None, None]
        delta = torch.where(wrote, delta - buffer - closed, delta)
        return delta, torch.where(wrote, opened, buffer + opened), left, writes


def _outer(error: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """sum_t scale_t error_t x_t^T: (B, O, I)."""
    return (error.to(scale.dtype) * scale[..., None]).mT @ x.to(scale.dtype)
