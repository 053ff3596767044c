"""Newton-Schulz for many matrices of one shape: three batched products per step, in the dtype that comes in.

Large matrices on a CPU go one by one: each fills the caches by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.ops.newton_schulz.reference import QUINTIC

ALONE = 1 << 17  # entries of a matrix from which on a CPU takes one at a time


def newton_schulz(
    X: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC, *, eps: float = 1e-7
) -> Tensor:
    """The numbers of reference.newton_schulz up to rounding; X (..., m, n).

    bfloat16 is computed in bfloat16, whose products are several times faster where the hardware has them, and whose
    error stays below the polynomial's own (README.md); float16 in float32.
    """
    with torch.autocast(X.device.type, enabled=False):
        x = unit(X.reshape(-1, *X.shape[-2:]), eps)
        if len(x) == 1:
            x = iterate(x[0], steps, coefficients, torch.addmm)
        elif len(x) and x.device.type == "cpu" and x.shape[-2] * x.shape[-1] >= ALONE:
            x = torch.stack([iterate(matrix, steps, coefficients, torch.addmm) for matrix in x])
        else:
            x = iterate(x, steps, coefficients, torch.baddbmm)
        return x.reshape(X.shape).to(X.dtype)


def iterate(
    x: Tensor, steps: int, coefficients: tuple[float, float, float], add_product: Callable[..., Tensor]
) -> Tensor:
    """The polynomial, `steps` times. A tall matrix has its factor on the right, and nothing is transposed in memory."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(steps):
        A = x.mT @ x if tall else x @ x.mT
        A = add_product(A, A, A, beta=b, alpha=c)
        x = add_product(x, x, A, beta=a) if tall else add_product(x, A, x, beta=a)
    return x


def unit(x: Tensor, eps: float) -> Tensor:
    """Matrices of unit norm in the dtype of the products."""
    x = x.float() if x.dtype == torch.float16 else x
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
