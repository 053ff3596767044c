"""The unit-triangular system of a chunk, its backward pass written out: few passes over (C, C) matrices.

    p = eta m,   (I + A ∘ K Kᵀ eta) m = error,   A_ts = e^{later_t - g_s} for s < t

Decays enter only through A, so their gradients need no (C, C) matrix: that of later_t is d_error_t·(m_t - error_t),
that of g_s is p_s·(dp_s - w_s), where w solves the transposed system and d_error = eta w. Second derivatives go through
`plain`. Letters as in writes.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.ops.self_modifying.derivatives import Given, differentiable


def written(k: Tensor, error: Tensor, eta: Tensor, later: Tensor, g: Tensor, A: Tensor) -> Tensor:
    """p (B, G, M, C, V) for k (B, G, C, F), error like p, eta, later and g (B, G, M, C), A = decays(later, g)."""
    (p,) = _Written.apply(k, error, eta, later, g, A)
    return p


def decays(later: Tensor, g: Tensor) -> Tensor:
    """e^{later_t - g_s} for s < t, 1 elsewhere; (..., C) → (..., C, C). No gradient: `written` has it."""
    return (later.detach()[..., :, None] - g.detach()[..., None, :]).clamp_(max=0).exp_()


def plain(k: Tensor, error: Tensor, eta: Tensor, later: Tensor, g: Tensor, A: Tensor) -> tuple[Tensor]:
    A = (later[..., :, None] - g[..., None, :]).clamp(max=0).exp()
    L = A * (k @ k.mT).tril(-1).unsqueeze(2) * eta[..., None]
    return (torch.linalg.solve_triangular(L, eta[..., None] * error, upper=False, unitriangular=True),)


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, error: Tensor, eta: Tensor, later: Tensor, g: Tensor, A: Tensor) -> tuple[Tensor]:
        L = (A * (k @ k.mT).tril_(-1).unsqueeze(2)).mul_(eta[..., None, :])
        right = error.contiguous()
        m = torch.linalg.solve_triangular(L.mT, right.mT, upper=True, left=False, unitriangular=True).mT
        ctx.save_for_backward(k, error, eta, later, g, A, m)
        return (m * eta[..., None],)

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> Given:
        *given, m = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(plain, (), tuple(given), (dp,))
        k, error, eta, _, _, A = given
        dp, rate = dp.contiguous(), eta[..., None]
        L = (A * (k @ k.mT).tril_(-1).unsqueeze(2)).mul_(rate)
        w = torch.linalg.solve_triangular(L, dp.mT, upper=False, left=False, unitriangular=True).mT
        d_error, p = w * rate, m * rate
        d_gram = (d_error @ p.mT).mul_(A).sum(2).tril_(-1)
        dk = -((d_gram + d_gram.mT) @ k)
        return dk, d_error, (w * m).sum(-1), (d_error * (m - error)).sum(-1), (p * (dp - w)).sum(-1), None
