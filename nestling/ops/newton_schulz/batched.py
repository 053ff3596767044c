"""Newton-Schulz for many matrices of one shape: three batched products per step, in the dtype that comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.newton_schulz.reference import QUINTIC


def newton_schulz(
    X: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC, *, eps: float = 1e-7
) -> Tensor:
    """The numbers of reference.newton_schulz up to rounding; X (..., m, n).

    bfloat16 is computed in bfloat16, whose products are several times faster where the hardware has them, and whose
    error stays below the polynomial's own (README.md); float16 in float32.
    """
    with torch.autocast(X.device.type, enabled=False):
        a, b, c = coefficients
        x = unit(X, eps)
        for _ in range(steps):
            A = x @ x.mT
            A = torch.baddbmm(A, A, A, beta=b, alpha=c)
            x = torch.baddbmm(x, A, x, beta=a)
        return back(x, X)


def unit(X: Tensor, eps: float) -> Tensor:
    """X as (matrices, rows, columns) with rows <= columns, in the dtype of the products, and of unit norm."""
    x = X.reshape(-1, *X.shape[-2:])
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    x = x.float() if x.dtype == torch.float16 else x
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)


def back(x: Tensor, X: Tensor) -> Tensor:
    """The result of `unit`'s orientation in X's shape and dtype."""
    return (x.mT if X.shape[-2] > X.shape[-1] else x).reshape(X.shape).to(X.dtype)
