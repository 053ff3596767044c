"""The write of a factored gradient on a GPU: D is read once and written once, and nothing else of its size exists.

One program per row and tile of D. It sums the tile of left^T right over the tokens in float32, then decays, scales and
adds in registers. Two things that the matrix product of chunk.py cannot do: the scale of the row and the decay cost no
pass of their own, and factors that came in bfloat16 stay bfloat16 on the tensor cores while D is float32.
The length of the write is not computed here: it must be known before the scale, and from the factors it costs
R^2 (O + I) instead of R O I (`FastMatrix.norm`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, TOKENS = 64, 32  # a tile of D is TILE x TILE; tokens per step of the sum


def cms_write(delta: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, keep: float = 1.0) -> Tensor:
    """The numbers of reference.cms_write up to rounding; arguments and result as there. Not differentiable."""
    delta, scale = delta.contiguous(), scale.float().contiguous()
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
    B, O, I = delta.shape
    after = torch.empty_like(delta)
    with torch.cuda.device_of(delta):
        _write[triton.cdiv(O, TILE), triton.cdiv(I, TILE), B](
            delta, left, right, scale, after, keep, left.shape[1], O, I,
            TILE=TILE, TOKENS=TOKENS, EXACT="tf32x3" if dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return after


@triton.jit
def _write(
    delta, left, right, scale, after, keep, R, O, I,
    TILE: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """D <- keep D + scale_b sum_r left_r right_r^T on one tile of one row."""
    row = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    product = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, R, TOKENS):
        r = first + tl.arange(0, TOKENS)
        x = tl.load(
            left + row * R * O + r[None, :] * O + o[:, None], mask=(r < R)[None, :] & (o < O)[:, None], other=0.0
        )
        y = tl.load(
            right + row * R * I + r[:, None] * I + i[None, :], mask=(r < R)[:, None] & (i < I)[None, :], other=0.0
        )
        product += tl.dot(x, y, input_precision=EXACT)
    at = row * O * I + o[:, None] * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    old = tl.load(delta + at, mask=inside, other=0.0)
    tl.store(after + at, (keep * old + tl.load(scale + row) * product).to(after.dtype.element_ty), mask=inside)
