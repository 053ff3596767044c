"""Linear attention as the loop that is its equation."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep, write, read, token by token; the read of a token sees its own write.

        M_t = exp(log_decay_t) M_{t-1} + k_t v_t^T,   o_t = M_t^T q_t

    q, k (B, T, H, K), v (B, T, H, V), log_decay (B, T, H) <= 0 or None for 0, initial_state (B, H, K, V) or None for
    zeros. Returns o (B, T, H, V) in v's dtype and the final state (B, H, K, V), float32 at least.
    Source: (17), (64); docs/equations.md.
    """
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        B, T, H, K = k.shape
        M = v.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
        outputs = []
        for t in range(T):
            if log_decay is not None:
                M = log_decay[:, t, :, None, None].to(dtype).exp() * M
            M = M + k[:, t, :, :, None].to(dtype) * v[:, t, :, None, :].to(dtype)
            outputs.append((M * q[:, t, :, :, None].to(dtype)).sum(-2))
        o = torch.stack(outputs, 1) if outputs else v
        return o.to(v.dtype), M
