"""TTT in chunks, the dual form: no weight inside a chunk is ever made (README.md).

All gradients of a chunk are taken at its first state, so each is an outer product of a matrix's input and the error at
its output, and what a token reads of the writes before it is a masked C x C product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.ops.chunks import from_chunks, to_chunks
from nestling.ops.groups import in_groups
from nestling.ops.ttt.reference import EPS, check
from nestling.ops.walk import Matrices, pick, walk

Write = tuple[Tensor, Tensor]  # inputs (R, C, F) and values (R, C, V) of one matrix


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    *,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    state: tuple[Tensor, ...] | None = None,
    chunk_size: int = 16,
    count: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same numbers as reference.ttt at the same chunk_size; arguments and results as there.

    A call of one token has a fixed shape and does not synchronise.
    """
    check(k, weights, norm, state, chunk_size)
    with torch.autocast(v.device.type, enabled=False):
        memory = _Memory(weights, norm, torch.promote_types(v.dtype, torch.float32))
        anchor, running = memory.enter(len(v), state)
        y, anchor, running = walk(memory, (q, k, v, eta), anchor, running, count, lengths, chunk_size)
        ends = zip((*anchor, *running), memory.weights * 2, strict=True)
        return y.to(v.dtype), tuple(m - w for m, w in ends)


class _Memory:
    """How `walk` sees it. Anchor and running are whole weights (B, H, in, out)."""

    def __init__(self, weights: tuple[Tensor, ...], norm: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights = tuple(w.to(dtype) for w in weights)
        self.norm = [p.to(dtype) for p in norm]

    def enter(self, rows: int, state: tuple[Tensor, ...] | None) -> tuple[Matrices, Matrices]:
        if state is None:
            fresh = [w.expand(rows, *w.shape) for w in self.weights]
            return fresh, fresh
        whole = [w + d.to(self.dtype) for w, d in zip(self.weights * 2, state, strict=True)]
        return whole[: len(self.weights)], whole[len(self.weights) :]

    def step(self, tokens: Any, anchor: Matrices, running: Matrices, alive: Tensor | None) -> tuple[Tensor, Matrices]:
        q, k, v, eta = (to_chunks(x, x.shape[1], self.dtype)[0] for x in tokens)
        if alive is not None:
            eta = eta.masked_fill(~alive[:, None], 0)
        y, running = advance((q, k, v, eta), self.norm, anchor, running)
        return y.transpose(1, 2), running

    def whole(self, tokens: Any, running: Matrices, full: Tensor | None, chunk_size: int) -> tuple[Tensor, Matrices]:
        chunks = [to_chunks(x, chunk_size, self.dtype) for x in tokens]
        wide = sum(w.shape[-1] for w in self.weights)
        numbers = 3 * sum(m.numel() for m in running) + 8 * chunks[3][0].numel() * (wide + chunk_size)
        return in_groups(_group, [*chunks, full], self.norm, running, numbers * self.dtype.itemsize)


def _group(tokens: list[Any], norm: list[Any], running: Matrices) -> tuple[Tensor, Matrices]:
    """Some of the chunks (N, B, H, C, ...), one after the other; full (N, B) or None = all."""
    *tokens, full = tokens
    outputs = []
    for n, part in enumerate(zip(*tokens, strict=True)):
        y, after = advance(part, norm, running, running)
        running = pick(None if full is None else full[n], after, running)
        outputs.append(y)
    return from_chunks(torch.stack(outputs)), running


def advance(tokens: Any, norm: Matrices, anchor: Matrices, running: Matrices) -> tuple[Tensor, Matrices]:
    """Read and write a part of one chunk, q, k, v (B, H, C, K), eta (B, H, C): y (B, H, C, K) and the new running."""
    q, k, v, eta = tokens
    scale, shift = (p[:, None] for p in norm)  # (H, 1, K)
    y, writes = q, written(k, v, eta, scale, shift, anchor)
    for i, (M, (inputs, values)) in enumerate(zip(running, writes, strict=True)):
        z = _with_one(F.gelu(y, approximate="tanh") if i else y)
        y = z @ M + (z @ inputs.mT).tril() @ values
    y = q + F.layer_norm(y, y.shape[-1:], eps=EPS) * scale + shift
    return y, [M + inputs.mT @ values for M, (inputs, values) in zip(running, writes, strict=True)]


def written(k: Tensor, v: Tensor, eta: Tensor, scale: Tensor, shift: Tensor, anchor: Matrices) -> list[Write]:
    """For each matrix the inputs and values whose products it grows by: -eta times the gradient at the anchor."""
    first = _with_one(k)
    a = first @ anchor[0]
    if len(anchor) == 1:
        return [(first, -eta[..., None] * _error(a, k, v, scale, shift))]
    hidden, slope = _gelu(a)
    second = _with_one(hidden)
    error = _error(second @ anchor[1], k, v, scale, shift)
    values = -eta[..., None] * error
    return [(first, (values @ anchor[1][..., :-1, :].mT) * slope), (second, values)]


def _error(z: Tensor, k: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Gradient of 1/2 |k + LN(z) - v|^2 with respect to z."""
    z = z - z.mean(-1, keepdim=True)
    size = torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)
    normed = z * size
    g = (k + normed * scale + shift - v) * scale
    g = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    return g * size


def _gelu(a: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(a) in its tanh form, and its derivative."""
    inner = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    t = torch.tanh(inner)
    grown = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a.square())
    return 0.5 * a * (1 + t), 0.5 * (1 + t) + 0.5 * a * (1 - t.square()) * grown


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)
