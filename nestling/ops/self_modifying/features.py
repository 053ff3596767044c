"""φ(z) = unit(silu(Fᵀ z)); on a CPU with its backward pass written out, in blocks that stay in the cache.

n = B*H rows and heads, t tokens. Nothing but the inputs is kept. Second derivatives, and a GPU, go through `plain`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.derivatives import differentiable
from nestling.ops.self_modifying.writes import EPS, unit

TOKENS = 64  # of every row and head in a block


def phi(z: Tensor, features: Tensor | None) -> Tensor:
    """z (B, H, T, K) → (B, H, T, F); features (H, K, F), None = z itself."""
    if features is None or z.device.type != "cpu" or z.shape[2] <= TOKENS:
        return plain(z, features)
    out: Tensor = _Phi.apply(z, features)
    return out


def plain(z: Tensor, features: Tensor | None) -> Tensor:
    return z if features is None else unit(functional.silu(z @ features))


def forward(z: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z (n, t, K), features (n, K, F) → the features f, and what `backward` needs: a before silu, 1 / |silu(a)|."""
    a = torch.bmm(z, features)
    f = functional.silu(a)
    size = scale(f)
    return f.mul_(size), a, size


def backward(df: Tensor, f: Tensor, a: Tensor, size: Tensor) -> Tensor:
    """Gradient in a."""
    return torch.ops.aten.silu_backward(unit_backward(df, f, size), a)


def scale(x: Tensor) -> Tensor:
    """1 / sqrt(|x|² + eps)."""
    return x.square().sum(-1, keepdim=True).add_(EPS).rsqrt_()


def unit_backward(grad: Tensor, unit: Tensor, size: Tensor) -> Tensor:
    """Gradient in x of unit = x * size(x)."""
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).mul_(size)


def per_row(x: Tensor, rows: int) -> Tensor:
    """One copy of (H, ...) for each row: (B*H, ...)."""
    return x.repeat(rows, *[1] * (x.dim() - 1))


class _Phi(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(z, features)
        each, out = per_row(features, len(z)), z.new_empty(*z.shape[:3], features.shape[-1])
        for here, there in zip(z.split(TOKENS, 2), out.split(TOKENS, 2), strict=True):
            there.copy_(forward(here.flatten(0, 1), each)[0].view(there.shape))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, features = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(lambda *x: (plain(*x),), (), (z, features), (grad,))
        each, dz = per_row(features, len(z)), torch.empty_like(z)
        total = torch.zeros_like(each)
        for part, df, there in zip(*(x.split(TOKENS, 2) for x in (z, grad, dz)), strict=True):
            here = part.flatten(0, 1)
            da = backward(df.flatten(0, 1), *forward(here, each))
            total.baddbmm_(here.mT, da)
            there.copy_(torch.bmm(da, each.mT).view(there.shape))
        return dz, total.unflatten(0, z.shape[:2]).sum(0)
