"""What the chunk forms of the delta rules share (gated_delta_rule/README.md has the equations).

All chunks are prepared together; what runs from chunk to chunk is two products. Letters: N chunks, R rows and heads,
C tokens of a chunk, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.ops.chunks import decay_matrix, from_chunks, to_chunks
from nestling.ops.groups import in_groups


def delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, or without g the delta rule: reference.py of those ops has shapes and results.

    A chunk has a power of two of tokens, chunk_size at most: then its triangular system is inverted block by block.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        B, T, H, K = k.shape
        M = v.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
        if not T:
            return v, M
        size = 1 << min(chunk_size.bit_length() - 1, (T - 1).bit_length())
        tokens = [None if x is None else to_chunks(x, size, dtype) for x in (q, k, v, beta, g)]
        numbers = B * H * (size * (6 * K + 4 * v.shape[-1] + 6 * size) + 2 * K * v.shape[-1])
        o, (M,) = in_groups(_group, tokens, (), [M], numbers * M.element_size())
        return o[:, :T].to(v.dtype), M


def _group(tokens: list[Any], _: list[Any], state: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Some of the chunks (N, B, H, C, ...): o (B, N C, H, V) and the state after them."""
    (M,) = state
    shape = M.shape
    here: list[Any] = [None if x is None else x.flatten(1, 2).contiguous() for x in tokens]
    q, k, v, beta, g = here  # (N, R, C, ...)
    scores, kept, of_start, to_end = q @ k.mT, None, beta, k
    overlap = beta[..., None] * (k @ k.mT)
    if g is None:
        scores = scores.tril()
    else:
        g = g.cumsum(-1)
        decay, grown = decay_matrix(g), g.exp()
        scores, overlap = scores * decay, overlap * decay
        q, of_start, kept = q * grown[..., None], beta * grown, grown[..., -1, None, None]
        to_end = k * decay[..., -1, :, None]
    inverse = _Inverse.apply(overlap)
    values = (inverse * beta[..., None, :]) @ v
    minus_reads = (inverse * -of_start[..., None, :]) @ k
    starts, written, M = _Scan.apply(values, minus_reads, to_end.mT, kept, None, M.flatten(0, 1), False)
    o = q @ starts + scores @ written
    return from_chunks(o.unflatten(1, shape[:2])), [M.view(shape)]


class _Inverse(torch.autograd.Function):
    """(I + A)^-1 from the part of A (..., C, C) under its diagonal, C a power of two.

    The block under two inverted diagonal blocks is -X2 A21 X1: unlike in powers of A no term grows beyond the result.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        X = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A).clone()
        size = 1
        while size < A.shape[-1]:
            x, a = (_diagonal_blocks(y, 2 * size) for y in (X, A))
            x[..., size:, :size] = -(x[..., size:, size:] @ a[..., size:, :size]) @ x[..., :size, :size]
            size *= 2
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        return -(X.mT @ dX @ X.mT).tril(-1)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """(..., C, C) -> (..., C / size, size, size), a view."""
    blocks = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (..., block, size, block, size)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _Scan(torch.autograd.Function):
    """u_n = X_n + Y_n M_n,  M_{n+1} = kept_n M_n + Z_n u_n + W_n, forwards or backwards over n.

    X (N, R, C, V), Y (N, R, C, K), Z (N, R, K, C), kept (N, R, 1, 1) or None = 1, W (N, R, K, V) or None = 0, M
    (R, K, V). Returns all M_n, all u_n and the last M. The gradient of this recurrence is the same recurrence in the
    other direction, so it keeps chunk-start states alone and has derivatives of any order.
    """

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, Y: Tensor, Z: Tensor, kept: Tensor | None, W: Tensor | None, M: Tensor, back: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        starts, written = X.new_empty(len(X), *M.shape), torch.empty_like(X)
        for n in reversed(range(len(X))) if back else range(len(X)):
            starts[n] = M
            torch.baddbmm(X[n], Y[n], M, out=written[n])
            M = M if kept is None else kept[n] * M
            M = torch.baddbmm(M if W is None else M + W[n], Z[n], written[n])
        ctx.save_for_backward(Y, Z, kept, starts, written)
        ctx.back, ctx.added = back, W is not None
        return starts, written, M

    @staticmethod
    def backward(ctx: Any, d_starts: Tensor, d_written: Tensor, dM: Tensor) -> tuple[Tensor | None, ...]:
        Y, Z, kept, starts, written = ctx.saved_tensors
        after, dX, dM = _Scan.apply(d_written, Z.mT, Y.mT, kept, d_starts, dM, not ctx.back)
        d_kept = None if kept is None else (after * starts).sum((-1, -2), keepdim=True)
        return dX, dX @ starts.mT, after @ written.mT, d_kept, after if ctx.added else None, dM, None
