"""The gated delta rule as the loop that is its equation."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep, replace, read, token by token; the error is taken on the decayed memory, the read sees the write.

        M' = exp(g_t) M_{t-1},   M_t = M' + beta_t k_t (v_t - M'^T k_t)^T,   o_t = M_t^T q_t

    q, k (B, T, H, K), v (B, T, H, V), beta, g (B, T, H) with g <= 0 the log decay, initial_state (B, H, K, V) or None
    for zeros. k is expected to have unit norm; then beta in [0, 2] is stable, 1 replaces completely.
    Returns o (B, T, H, V) in v's dtype and the final state (B, H, K, V), float32 at least.
    Source: (65) with Ret = |M - alpha M_{t-1}|^2; docs/equations.md.
    """
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        B, T, H, K = k.shape
        M = v.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
        outputs = []
        for t in range(T):
            key = k[:, t, :, :, None].to(dtype)
            M = g[:, t, :, None, None].to(dtype).exp() * M
            error = v[:, t].to(dtype) - (M * key).sum(-2)  # (B, H, V)
            M = M + key * (beta[:, t, :, None].to(dtype) * error)[:, :, None]
            outputs.append((M * q[:, t, :, :, None].to(dtype)).sum(-2))
        o = torch.stack(outputs, 1) if outputs else v
        return o.to(v.dtype), M
