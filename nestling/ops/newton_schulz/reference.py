"""Newton-Schulz as the loop that is its equation, one matrix after the other."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's: 5 steps put every singular value above 1e-3 of the norm into [0.6, 1.21]
CUBIC = (1.5, -0.5, 0.0)  # converges to 1 and slowly so: 0.1 is still at 0.33 after 3 steps


def newton_schulz(
    X: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC, *, eps: float = 1e-7
) -> Tensor:
    """Move all singular values towards 1 and leave the singular vectors: X = U S V^T becomes about U V^T.

        X_0 = X / max(|X|, eps),   X_{i+1} = (a I + b A + c A^2) X_i,  A = X_i X_i^T

    X (..., m, n); a tall matrix is worked on transposed, so that A is the smaller square. A zero matrix stays zero.
    Returns X's shape and dtype; computed in float32 at least.
    Source: (42)-(44) and Muon's polynomial; docs/equations.md.
    """
    with torch.autocast(X.device.type, enabled=False):
        made = (
            [_one(x, steps, coefficients, eps) for x in X.flatten(0, -3)]
            if X.dim() > 2
            else [_one(X, steps, coefficients, eps)]
        )
        return torch.stack(made).view(X.shape).to(X.dtype) if made else X


def _one(X: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    m, n = X.shape
    if m > n:
        return _one(X.T, steps, coefficients, eps).T
    a, b, c = coefficients
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    X = X / torch.linalg.matrix_norm(X).clamp_min(eps)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X
