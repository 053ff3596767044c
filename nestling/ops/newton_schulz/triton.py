"""Newton-Schulz on a GPU: both symmetric products of a step are computed for half of their entries.

A = X X^T and b A + c A A^T are symmetric, so one kernel makes the tiles on and below the diagonal, adds the other term
of the polynomial in registers, and writes each tile twice. The third product, (a I + ...) X, is not symmetric and stays
with the vendor's library. Not differentiable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestling.ops.newton_schulz.batched import unit
from nestling.ops.newton_schulz.reference import QUINTIC


@torch.no_grad()
def newton_schulz(
    X: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC, *, eps: float = 1e-7
) -> Tensor:
    """The numbers of reference.newton_schulz up to rounding; X (..., m, n) in bfloat16 or float32."""
    with torch.autocast(X.device.type, enabled=False):
        a, b, c = coefficients
        tall = X.shape[-2] > X.shape[-1]
        x = unit(X.reshape(-1, *X.shape[-2:]), eps)
        x = (x.mT if tall else x).contiguous()
        for _ in range(steps):
            A = symmetric(x)
            A = symmetric(A, added=A, b=b, c=c)
            x = torch.baddbmm(x, A, x, beta=a)
        return (x.mT if tall else x).reshape(X.shape).to(X.dtype)


def symmetric(x: Tensor, added: Tensor | None = None, b: float = 0.0, c: float = 1.0) -> Tensor:
    """c x x^T + b added: x (N, m, k) contiguous, added (N, m, m) symmetric."""
    N, m, k = x.shape
    out = x.new_empty(N, m, m)
    half = x.dtype == torch.bfloat16
    tile = 128 if half and m > 128 else 64
    tiles = triton.cdiv(m, tile)
    with torch.cuda.device_of(x):
        _symmetric[(tiles, tiles, N)](
            x, out if added is None else added, out, m, k, b, c, ADD=added is not None, TILE=tile,
            INNER=64 if half else 32, EXACT="tf32" if half else "tf32x3", num_warps=8 if tile == 128 else 4,
            num_stages=3,
        )  # fmt: skip
    return out


@triton.jit
def _symmetric(
    X, S, out, m, k, b, c,
    ADD: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of c X X^T + b S and its mirror image; programs above the diagonal have nothing to do."""
    i, j, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j <= i:
        rows, columns, inner = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, INNER)
        x = X + n * m * k
        total = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, k, INNER):
            at = start + inner
            left = tl.load(x + rows[:, None] * k + at[None, :], (rows[:, None] < m) & (at[None, :] < k), 0.0)
            right = tl.load(x + columns[:, None] * k + at[None, :], (columns[:, None] < m) & (at[None, :] < k), 0.0)
            total += tl.dot(left, tl.trans(right), input_precision=EXACT)
        total *= c
        inside = (rows[:, None] < m) & (columns[None, :] < m)
        here, mirrored = rows[:, None] * m + columns[None, :], rows[:, None] + columns[None, :] * m
        if ADD:
            total += b * tl.load(S + n * m * m + here, inside, 0.0).to(tl.float32)
        made = total.to(out.dtype.element_ty)
        tl.store(out + n * m * m + here, made, inside)
        if j < i:
            tl.store(out + n * m * m + mirrored, made, inside)
