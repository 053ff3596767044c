"""The selective scan as the loop that is its equation."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decay, write, read, token by token; the read of a token sees its own write.

        h_t = exp(-step_t rate) * h_{t-1} + (step_t x_t) write_t^T,   y_t = h_t read_t

    x, step (B, T, E) inputs and step sizes >= 0 of E channels, rate (E, N) > 0 of N states per channel, write and read
    (B, T, N), which all channels share, initial_state (B, E, N) or None for zeros. The paper's A, B, C are -rate,
    write, read. Returns y (B, T, E) in x's dtype and the final state (B, E, N), float32 at least.
    Source: Mamba, arXiv 2312.00752, Algorithm 2; docs/equations.md.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        B, T, E = x.shape
        h = x.new_zeros(B, E, rate.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
        outputs = []
        for t in range(T):
            size = step[:, t, :, None].to(dtype)
            written = x[:, t, :, None].to(dtype) * write[:, t, None].to(dtype)
            h = torch.exp(-size * rate.to(dtype)) * h + size * written
            outputs.append((h * read[:, t, None].to(dtype)).sum(-1))
        y = torch.stack(outputs, 1) if outputs else x
        return y.to(x.dtype), h
