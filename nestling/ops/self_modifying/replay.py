"""Whole chunks of any memory under any rule: the backward pass runs each chunk again from its first state.

Memory then grows with the chunk-start states, and not with what the arithmetic inside a chunk leaves behind. Second
derivatives go through the same loop as autograd records it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestling.ops.self_modifying.derivatives import Given, differentiable, learns
from nestling.ops.self_modifying.writes import Matrices
from nestling.ops.walk import pick


def scan(
    made: Callable[..., Any],
    z: Tensor,
    q: Tensor | None,
    E: Matrices,
    parameters: Given,
    full: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Matrices]:
    """Read and write z, q (B, H, N*C, K), N > 0, from the matrices E on; full (N, B): who commits which chunk.

    `made(*parameters)` are the memories, with `step` for one chunk. Returns y (B, H, N*C, V) and the final matrices.
    """
    tensors = (z, q, *E, *parameters)
    run = _scan if not learns(*tensors) or z.shape[2] == chunk_size else _Replayed.apply
    y, *final = run(made, full, chunk_size, len(E), *tensors)
    return y, final


def _scan(made: Callable[..., Any], full: Tensor | None, C: int, matrices: int, *tensors: Any) -> Given:
    z, q, *E = tensors[: 2 + matrices]
    memories = made(*tensors[2 + matrices :])
    outputs = []
    for i in range(z.shape[2] // C):
        y, E = _one(memories, _cut(z, q, i, C), E, full, i)
        outputs.append(y)
    return torch.cat(outputs, 2), *E


def _one(memories: Any, inputs: Given, E: Matrices, full: Tensor | None, i: int) -> tuple[Tensor, Matrices]:
    """Chunk i: what it reads, and the matrices after it in the rows that fill it."""
    y, grown = memories.step(*inputs, E, E, None)
    return y, pick(None if full is None else full[i], grown, E)


def _cut(z: Tensor, q: Tensor | None, i: int, C: int) -> Given:
    return tuple(None if x is None else x[:, :, i * C : (i + 1) * C] for x in (z, q))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Callable, full: Tensor | None, C: int, matrices: int, *tensors: Any) -> Given:
        z, q, *E = tensors[: 2 + matrices]
        memories = made(*tensors[2 + matrices :])
        outputs, starts = [], []
        for i in range(z.shape[2] // C):
            starts += E
            y, E = _one(memories, _cut(z, q, i, C), E, full, i)
            outputs.append(y)
        ctx.options = made, full, C, matrices, len(tensors)
        ctx.save_for_backward(*tensors, *starts)
        return torch.cat(outputs, 2), *E

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dE: Any) -> Given:
        made, full, C, matrices, given = ctx.options
        saved = ctx.saved_tensors
        tensors, starts = saved[:given], saved[given:]
        if torch.is_grad_enabled():
            return (None,) * 4 + differentiable(_scan, (made, full, C, matrices), tensors, (dy, *dE))
        z, q = tensors[:2]
        fixed = _leaves(tensors[2 + matrices :])
        total = [None if t is None else torch.zeros_like(t) for t in fixed]
        d_inputs = [None if t is None else torch.empty_like(t) for t in (z, q)]
        for i in reversed(range(z.shape[2] // C)):
            moving = _leaves((*_cut(z, q, i, C), *starts[i * matrices : (i + 1) * matrices]))
            with torch.enable_grad():
                y, E = _one(made(*fixed), moving[:2], list(moving[2:]), full, i)
            found = _gradients((y, *E), (dy[:, :, i * C : (i + 1) * C], *dE), (*moving, *fixed))
            for whole, part in zip(d_inputs, found, strict=False):
                if whole is not None and part is not None:
                    whole[:, :, i * C : (i + 1) * C] = part
            dE = found[2 : 2 + matrices]
            for sum_, part in zip(total, found[2 + matrices :], strict=True):
                if sum_ is not None:
                    sum_.add_(part)
        return (None,) * 4 + (*d_inputs, *dE, *total)


def _leaves(tensors: Given) -> Given:
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


def _gradients(outputs: Given, grads: Given, inputs: Given) -> Given:
    """One gradient per input, zeros where there is none; None for None."""
    there = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, there, grads, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(found) for t in inputs)
