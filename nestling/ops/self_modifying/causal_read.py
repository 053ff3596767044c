"""Reading between the writes of whole chunks, y_t = M_{t-1}(q_t); on a CPU with its backward pass written out.

Chunk by chunk, so that what a chunk needs stays in the cache and nothing but the inputs is kept. Second derivatives,
and a GPU, which takes all chunks at once, go through `plain`. n = B*H rows and heads, C chunk length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nestling.ops.self_modifying import features as feature_map
from nestling.ops.self_modifying.derivatives import Given, differentiable
from nestling.ops.self_modifying.writes import decay_matrix, read_written, shift


def causal_read(
    q: Tensor, features: Tensor | None, initial: Tensor, keys: Tensor, values: Tensor, g: Tensor, starts: Tensor
) -> Tensor:
    """q (B, H, N*C, K) through φ and the memory that is read → (B, H, N*C, V).

    initial (H, F, V); keys (B, H, N, C, F), values (B, H, N, C, V), g (B, H, N, C) and the deviations starts
    (B, H, N, F, V) as `write_chunks` returns them.
    """
    run = _CausalRead.apply if q.device.type == "cpu" else plain
    (y,) = run(q, features, initial, keys, values, g, starts)
    return y


def plain(
    q: Tensor, features: Tensor | None, initial: Tensor, keys: Tensor, values: Tensor, g: Tensor, starts: Tensor
) -> tuple[Tensor]:
    q = feature_map.plain(q, features)
    y = read_written(q.unflatten(2, keys.shape[2:4]), starts, keys, values, g).flatten(2, 3)
    return (y + q @ initial,)


class _CausalRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, features: Tensor | None, initial: Tensor, *written: Tensor) -> tuple[Tensor]:
        ctx.save_for_backward(q, features, initial, *written)
        y = q.new_empty(*q.shape[:3], initial.shape[-1])
        F, W = _per_row(len(q), features, initial)
        for raw, out, (k, p, g, E) in _chunks((q, y), written):
            f = raw.flatten(0, 1) if F is None else feature_map.forward(raw.flatten(0, 1), F)[0]
            before = shift(g)
            P = decay_matrix(before, g).mul_(torch.bmm(f, k.mT))
            read = torch.bmm(f, E).mul_(before.exp()[..., None]).baddbmm_(f, W).baddbmm_(P, p)
            out.copy_(read.view(out.shape))
        return (y,)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Given:
        given = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(plain, (), given, (dy,))
        q, features, initial, *written = given
        dq, d_written = torch.empty_like(q), tuple(torch.empty_like(x) for x in written)
        F, W = _per_row(len(q), features, initial)
        dW, dF = torch.zeros_like(W), None if F is None else torch.zeros_like(F)
        grads = _chunks((dy, dq), d_written)
        for (raw, _, chunk), (d_out, d_raw, d_chunk) in zip(_chunks((q, q), written), grads, strict=True):
            z, d_out = raw.flatten(0, 1), d_out.flatten(0, 1)
            f, *rest = (z,) if F is None else feature_map.forward(z, F)
            df = _backward(d_out, f, W, chunk, d_chunk)
            dW.baddbmm_(f.mT, d_out)
            if dF is not None:
                da = feature_map.backward(df, f, *rest)
                dF.baddbmm_(z.mT, da)
                df = torch.bmm(da, F.mT)
            d_raw.copy_(df.view(d_raw.shape))
        d_features, d_initial = (None if x is None else x.unflatten(0, q.shape[:2]).sum(0) for x in (dF, dW))
        return dq, d_features, d_initial, *d_written


def _backward(dy: Tensor, f: Tensor, W: Tensor, chunk: tuple[Tensor, ...], d_chunk: tuple[Tensor, ...]) -> Tensor:
    """One chunk: fills the gradients of k, p, g, E and returns that of the features f (n, C, F)."""
    (k, p, g, E), (dk, dp, dg, dE) = chunk, d_chunk
    before = shift(g)
    A = decay_matrix(before, g)
    gram = torch.bmm(f, k.mT)
    P = A * gram
    torch.bmm(P.mT, dy, out=dp)
    d_P = torch.bmm(dy, p.mT)
    d_gram = A.mul_(d_P)
    torch.bmm(d_gram.mT, f, out=dk)
    decayed = dy * before.exp()[..., None]
    torch.bmm(f.mT, decayed, out=dE)
    inside = P.mul_(d_P)  # the gradient of log A
    df = torch.bmm(decayed, E.mT)
    d_before = inside.sum(-1) + (df * f).sum(-1)
    torch.sum(inside, -2, out=dg).neg_()
    dg[:, :-1] += d_before[:, 1:]
    return df.baddbmm_(d_gram, k).baddbmm_(dy, W.mT)


def _per_row(rows: int, *tensors: Any) -> list[Any]:
    return [None if x is None else feature_map.per_row(x, rows) for x in tensors]


def _chunks(tokens: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> Iterator[tuple[Any, ...]]:
    """Per chunk: the views of (B, H, N*C, ...) tensors, and those of (B, H, N, ...) tensors as (n, ...)."""
    N = written[0].shape[2]
    parts = [x.unflatten(2, (N, -1)).unbind(2) for x in tokens]
    chunks = [x.flatten(0, 1).unbind(1) for x in written]
    for i in range(N):
        yield (*(part[i] for part in parts), tuple(chunk[i] for chunk in chunks))
