"""The gated delta rule on a GPU: what runs along the sequence is small, everything else is parallel over chunks.

Four kernels (README.md has the equations and counts the bytes):

    _inverse     one program per chunk, row and head: (I + A)^-1
    _forward     one per row, head and block of value columns, chunk after chunk: outputs, chunk-start states
    _backward    the same in reverse: gradient of the state after each chunk
    _gradients   one per chunk, row and head: gradients of q, k, v, beta, g from the states at both ends of the chunk

The state stays float32 in registers. Products take the inputs' dtype (bfloat16 on tensor cores) and accumulate in
float32; the inverse stays float32 (tf32, or three times tf32 for float32 inputs). Letters as in chunk.py: u what each
token writes at its key, G the sum of log decays inside a chunk, e = exp(G); only differences of G <= 0 are
exponentiated. A token past the end has beta = g = 0 and zero vectors: it writes nothing and decays nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestling.ops.gated_delta_rule import chunk

VALUE_BLOCK = 32  # value columns of one program that walks along the sequence


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The numbers of reference.gated_delta_rule up to rounding; shapes and results as there.

    A gradient that is differentiated again comes from the chunk form.
    K and V are 16, 32, 64 or 128. The chunk is the power of two at or below chunk_size, from 16 to 64 (32 for float32).
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    B, T, H, K = k.shape
    start = v.new_zeros(B, H, K, v.shape[-1], dtype=torch.float32) if initial_state is None else initial_state.float()
    if not T:
        return v, start
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    size = min(max(1 << (chunk_size.bit_length() - 1), 16), 32 if dtype == torch.float32 else 64)
    inputs = (q.to(dtype), k.to(dtype), v.to(dtype), beta.float(), g.float(), start)
    o, end = _GatedDeltaRule.apply(size, *(x.contiguous() for x in inputs))
    return o.to(v.dtype), end


class _GatedDeltaRule(torch.autograd.Function):
    """Keeps the inputs and the chunk-start states; the backward recomputes the rest of a chunk from them."""

    @staticmethod
    def forward(ctx: Any, size: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta, g, start = inputs
        shape = _Shape(k, v, size)
        keep = any(ctx.needs_input_grad)
        o, end = torch.empty_like(v), torch.empty_like(start)
        states = start.new_empty(shape.rows, shape.chunks if keep else 0, *start.shape[2:])
        with torch.cuda.device_of(v):
            _forward[shape.along](
                q, k, v, beta, g, shape.inverse(k, beta, g), start, o, states, end,
                *shape.tokens, KEEP=keep, **shape.walk,
            )  # fmt: skip
        ctx.save_for_backward(*inputs, states)
        ctx.size = size
        return o, end

    @staticmethod
    def backward(ctx: Any, do: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, *_differentiable(inputs, (do, d_end)))
        q, k, v, beta, g, _ = inputs
        shape = _Shape(k, v, ctx.size)
        do, d_end = do.contiguous(), d_end.contiguous()
        inverse, d_start, d_states = shape.inverse(k, beta, g), torch.empty_like(d_end), torch.empty_like(states)
        d_solved = torch.empty_like(v, dtype=torch.float32)
        _backward[shape.along](
            q, k, beta, g, inverse, do, d_end, d_states, d_solved, d_start, *shape.tokens, **shape.walk
        )
        dq, dk, dv, dbeta, dg = (torch.empty_like(x) for x in (q, k, v, beta, g))
        _gradients[shape.across](
            q, k, v, beta, g, inverse, states, d_states, d_solved, do, dq, dk, dv, dbeta, dg,
            *shape.tokens, **shape.wide,
        )  # fmt: skip
        return None, dq, dk, dv, dbeta, dg, d_start


def _differentiable(inputs: list[Tensor], outer: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients as autograd records them in the chunk form: they can be differentiated again."""
    alias = [x.view_as(x) for x in inputs]  # cuts the inputs' own history off
    outputs = chunk.gated_delta_rule(*alias[:5], initial_state=alias[5])
    wanted = [x for x in alias if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, outer, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in alias)


class _Shape:
    """Grids and constants that the kernels share."""

    def __init__(self, k: Tensor, v: Tensor, size: int) -> None:
        B, T, H, K = k.shape
        V = v.shape[-1]
        self.rows, self.chunks, self.size, self.block = B * H, triton.cdiv(T, size), size, min(V, VALUE_BLOCK)
        self.tokens = (T, H)
        self.along, self.across = (V // self.block, self.rows), (self.chunks, self.rows)
        exact = "tf32x3" if v.dtype == torch.float32 else "tf32"
        self.fixed = {"K": K, "C": size, "EXACT": exact}
        values = {"V": V, "BV": self.block, **self.fixed}
        self.walk = {"num_warps": 4 if K <= 64 else 8, "num_stages": 2, **values}
        self.wide = {"num_warps": 8, "num_stages": 1, **values}

    def inverse(self, k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        """(I + A)^-1 of every chunk, (B H, N, C, C) float32."""
        inverse = beta.new_empty(self.rows, self.chunks, self.size, self.size)
        levels = self.size.bit_length() - 1
        _inverse[self.across](k, beta, g, inverse, *self.tokens, LEVELS=levels, num_warps=4, **self.fixed)
        return inverse


@triton.jit
def _tokens(n, row, T, H, C: tl.constexpr):
    """The first token of a chunk in (B, T, H), the way from it to each of the others, and which of them exist."""
    i = tl.arange(0, C)
    return (row // H * T + n * C) * H + row % H, i * H, n * C + i < T


@triton.jit
def _vectors(x, first, at, real, columns, width: tl.constexpr):
    """(C, columns) of x (B, T, H, width), zeros past the end."""
    return tl.load(x + first * width + (at[:, None] * width + columns[None, :]), mask=real[:, None], other=0.0)


@triton.jit
def _gates(beta, g, first, at, real):
    """beta_t, G_t (C), and the G of the whole chunk."""
    step = tl.load(g + first + at, mask=real, other=0.0)
    return tl.load(beta + first + at, mask=real, other=0.0), tl.cumsum(step, 0), tl.sum(step, 0)


@triton.jit
def _decay(G, C: tl.constexpr):
    """exp(G_t - G_s) for s <= t, else 0: (C, C)."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.exp(tl.where(t >= s, G[:, None] - G[None, :], float("-inf")))


@triton.jit
def _inverse(k, beta, g, inverse, T, H, K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """(I + A)^-1 with A_ts = beta_t exp(G_t - G_s) k_t.k_s, s < t, from inverses of diagonal blocks of doubled size:
    the block under two inverted ones is -X2 A21 X1. Unlike powers of A no term grows beyond the result."""
    n, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, at, real = _tokens(n, row, T, H, C)
    x = _vectors(k, first, at, real, tl.arange(0, K), K)
    rate, G, _ = _gates(beta, g, first, at, real)
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    A = tl.where(t > s, rate[:, None] * _decay(G, C) * tl.dot(x, tl.trans(x), input_precision=EXACT), 0.0)
    X = tl.where(t == s, 1.0, 0.0) - tl.where(t // 2 == s // 2, A, 0.0)
    for level in tl.static_range(1, LEVELS):
        size = 2**level
        below = tl.where((t // (2 * size) == s // (2 * size)) & (t // size != s // size), A, 0.0)
        X -= tl.dot(tl.dot(X, below, input_precision=EXACT), X, input_precision=EXACT)
    tl.store(inverse + (row * tl.num_programs(0) + n) * C * C + t * C + s, X)


@triton.jit
def _forward(
    q, k, v, beta, g, inverse, start, o, states, end, T, H,
    KEEP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """u = (I + A)^-1 beta (v - e k M),  o = e q M + (q k^T . D) u,  M <- e_C M + (k e_C/e)^T u."""
    row, N = tl.program_id(1).to(tl.int64), tl.cdiv(T, C)
    keys, columns = tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    matrix, square = keys[:, None] * V + columns[None, :], tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    M = tl.load(start + row * K * V + matrix)
    for n in range(N):
        if KEEP:
            tl.store(states + (row * N + n) * K * V + matrix, M)
        first, at, real = _tokens(n, row, T, H, C)
        xq, xk, xv = (
            _vectors(q, first, at, real, keys, K),
            _vectors(k, first, at, real, keys, K),
            _vectors(v, first, at, real, columns, V),
        )
        rate, G, total = _gates(beta, g, first, at, real)
        e, low = tl.exp(G)[:, None], M.to(xk.dtype)
        error = xv - e * tl.dot(xk, low, input_precision=EXACT)
        solve = tl.load(inverse + (row * N + n) * C * C + square)
        u = tl.dot(solve, rate[:, None] * error, input_precision=EXACT).to(xk.dtype)
        scores = tl.dot(xq, tl.trans(xk), input_precision=EXACT) * _decay(G, C)
        y = e * tl.dot(xq, low, input_precision=EXACT) + tl.dot(scores.to(xk.dtype), u, input_precision=EXACT)
        tl.store(o + first * V + (at[:, None] * V + columns[None, :]), y.to(o.dtype.element_ty), mask=real[:, None])
        to_end = (xk * tl.exp(total - G)[:, None]).to(xk.dtype)
        M = tl.exp(total) * M + tl.dot(tl.trans(to_end), u, input_precision=EXACT)
    tl.store(end + row * K * V + matrix, M)


@triton.jit
def _backward(
    q, k, beta, g, inverse, do, d_end, d_states, d_solved, d_start, T, H,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dM <- e_C dM + (e q)^T do - (beta e k)^T dr from the last chunk to the first; d_states is dM after each chunk,
    d_solved dr, the gradient of beta (v - e k M)."""
    row, N = tl.program_id(1).to(tl.int64), tl.cdiv(T, C)
    keys, columns = tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    matrix, square = keys[:, None] * V + columns[None, :], tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    dM = tl.load(d_end + row * K * V + matrix)
    for i in range(N):
        n = N - 1 - i
        tl.store(d_states + (row * N + n) * K * V + matrix, dM)
        first, at, real = _tokens(n, row, T, H, C)
        xq, xk, dy = (
            _vectors(q, first, at, real, keys, K),
            _vectors(k, first, at, real, keys, K),
            _vectors(do, first, at, real, columns, V),
        )
        rate, G, total = _gates(beta, g, first, at, real)
        solve = tl.load(inverse + (row * N + n) * C * C + square)
        to_end = (xk * tl.exp(total - G)[:, None]).to(xk.dtype)
        scores = (tl.dot(xq, tl.trans(xk), input_precision=EXACT) * _decay(G, C)).to(xk.dtype)
        du = tl.dot(tl.trans(scores), dy, input_precision=EXACT)
        du += tl.dot(to_end, dM.to(xk.dtype), input_precision=EXACT)
        dr = tl.dot(tl.trans(solve), du, input_precision=EXACT)
        tl.store(d_solved + first * V + (at[:, None] * V + columns[None, :]), dr, mask=real[:, None])
        e = tl.exp(G)[:, None]
        dM = tl.exp(total) * dM + tl.dot(tl.trans(xq), (e * dy).to(xk.dtype), input_precision=EXACT)
        dM -= tl.dot(tl.trans(xk), (rate[:, None] * e * dr).to(xk.dtype), input_precision=EXACT)
    tl.store(d_start + row * K * V + matrix, dM)


@triton.jit
def _gradients(
    q, k, v, beta, g, inverse, states, d_states, d_solved, do, dq, dk, dv, dbeta, dg, T, H,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What one chunk gives its own inputs: sums over blocks of value columns first, then the C x C products."""
    n, row, N = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    keys, t, s = tl.arange(0, K), tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    first, at, real = _tokens(n, row, T, H, C)
    xq, xk = _vectors(q, first, at, real, keys, K), _vectors(k, first, at, real, keys, K)
    rate, G, total = _gates(beta, g, first, at, real)
    e, after = tl.exp(G)[:, None], tl.exp(total - G)[:, None]
    low_k = (xk * after).to(xk.dtype)
    solve = tl.load(inverse + (row * N + n) * C * C + t * C + s)
    d_scores, d_system = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    xdq, xdk = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    d_rate, dG, kept = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    d_total = tl.zeros((K,), tl.float32)
    for block in range(V // BV):
        columns = block * BV + tl.arange(0, BV)
        here = (row * N + n) * K * V + keys[:, None] * V + columns[None, :]
        M, dM = tl.load(states + here), tl.load(d_states + here)
        xv, dy = _vectors(v, first, at, real, columns, V), _vectors(do, first, at, real, columns, V)
        low, d_low = M.to(xk.dtype), dM.to(xk.dtype)
        stored = e * tl.dot(xk, low, input_precision=EXACT)
        error = xv - stored
        u = tl.dot(solve, rate[:, None] * error, input_precision=EXACT)
        dr = _vectors(d_solved, first, at, real, columns, V)
        d_error = rate[:, None] * dr
        tl.store(
            dv + first * V + (at[:, None] * V + columns[None, :]), d_error.to(dv.dtype.element_ty), mask=real[:, None]
        )
        kept += tl.sum(u * tl.dot(low_k, d_low, input_precision=EXACT), 1)
        d_rate += tl.sum(dr * error, 1)
        dG -= tl.sum(d_error * stored, 1)
        d_total += tl.sum(M * dM, 1)
        low_u = u.to(xk.dtype)
        d_scores += tl.dot(dy, tl.trans(low_u), input_precision=EXACT)
        d_system -= tl.dot(dr.to(xk.dtype), tl.trans(low_u), input_precision=EXACT)
        xdq += tl.dot((e * dy).to(xk.dtype), tl.trans(low), input_precision=EXACT)
        xdk -= tl.dot((e * d_error).to(xk.dtype), tl.trans(low), input_precision=EXACT)
        xdk += tl.dot((after * u).to(xk.dtype), tl.trans(d_low), input_precision=EXACT)
    dG += tl.sum(xdq * xq, 1)
    decay = _decay(G, C)
    d_scores, d_system = d_scores * decay, tl.where(t > s, d_system * decay, 0.0)
    products = tl.dot(xk, tl.trans(xk), input_precision=EXACT) * d_system
    d_rate += tl.sum(products, 1)
    through = (
        tl.where(t > s, tl.dot(xq, tl.trans(xk), input_precision=EXACT) * d_scores, 0.0) + rate[:, None] * products
    )
    dG += tl.sum(through, 1) - tl.sum(through, 0)
    d_scores, d_system = d_scores.to(xk.dtype), (rate[:, None] * d_system).to(xk.dtype)
    xdq += tl.dot(d_scores, xk, input_precision=EXACT)
    xdk += tl.dot(tl.trans(d_scores), xq, input_precision=EXACT)
    xdk += tl.dot(d_system, xk, input_precision=EXACT) + tl.dot(tl.trans(d_system), xk, input_precision=EXACT)
    tl.store(dq + first * K + (at[:, None] * K + keys[None, :]), xdq.to(dq.dtype.element_ty), mask=real[:, None])
    tl.store(dk + first * K + (at[:, None] * K + keys[None, :]), xdk.to(dk.dtype.element_ty), mask=real[:, None])
    tl.store(dbeta + first + at, d_rate, mask=real)
    to_end = tl.exp(total) * tl.sum(d_total, 0) + tl.sum(tl.where(t > s, kept[None, :], 0.0), 1)
    tl.store(dg + first + at, tl.cumsum(dG, 0, reverse=True) + to_end, mask=real)
