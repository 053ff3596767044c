"""The windowed update (71) of one linear layer as the token loop."""

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
    """Add each token's gradient to a buffer; when `period` tokens are in, subtract the buffer from the fast weights.

        buffer <- buffer + rate_t error_t x_t^T;   every period tokens: delta <- delta - buffer, buffer <- 0

    x        (B, T, I) inputs of the layer;  error (B, T, O) gradient of the task loss at its output
    rate     () or (B, T), eta_t;  reduction "mean" divides by the period, "sum" is (71)
    delta    (B, O, I) fast weights minus slow weights, oriented like nn.Linear.weight; None = zeros
    buffer   (B, O, I) gradients of the open window;  count (B,) int64 tokens in it; None = a window opens
    lengths  (B,) real tokens per row; the rest is padding and not counted
    Returns delta, buffer, count and the number of writes (B,) in this call. Rows may be at different phases.
    Source: (71) with the lower bound i - C + 1 (the printed i - C sums C + 1 terms); docs/equations.md.
    Raises ValueError for a period < 1 or an unknown reduction.
    """
    if period < 1 or reduction not in ("sum", "mean"):
        raise ValueError(f'period={period}, reduction={reduction!r}; need period >= 1 and "sum" or "mean"')
    with torch.autocast(x.device.type, enabled=False):
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        delta = x.new_zeros(B, error.shape[-1], x.shape[-1], dtype=dtype) if delta is None else delta.to(dtype)
        buffer = torch.zeros_like(delta) if buffer is None else buffer.to(dtype)
        count = torch.zeros(B, dtype=torch.long, device=x.device) if count is None else count
        writes = torch.zeros_like(count)
        scale = rate.to(dtype).expand(B, T) / (period if reduction == "mean" else 1)
        for t in range(T):
            real = torch.ones_like(count, dtype=torch.bool) if lengths is None else lengths > t
            gradient = scale[:, t, None, None] * error[:, t, :, None].to(dtype) * x[:, t, None, :].to(dtype)
            buffer = torch.where(real[:, None, None], buffer + gradient, buffer)
            count = count + real.long()
            full = count == period
            delta = torch.where(full[:, None, None], delta - buffer, delta)
            buffer = buffer.masked_fill(full[:, None, None], 0)
            count, writes = count.masked_fill(full, 0), writes + full.long()
        return delta, buffer, count, writes
