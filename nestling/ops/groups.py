"""A bound on what a long call keeps for its backward pass: groups of chunks, each run again from its first state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 256 * 2**20  # what one layer's intermediates may take; a call that needs more is cut into groups
Tensors = Sequence[Tensor | None]
Run = Callable[[list[Any], list[Any], list[Any]], tuple[Tensor, list[Tensor]]]


def in_groups(
    run: Run, tokens: Tensors, fixed: Tensors, state: list[Tensor], bytes_per_chunk: int
) -> tuple[Tensor, list[Tensor]]:
    """run(tokens (N, ...), fixed, state) -> y (B, T, ...), state; at once where that keeps little.

    Otherwise the state before each group is kept and nothing else, and the backward pass runs one group at a time
    again. Derivatives of any order.
    """
    chunks = len(tokens[0])  # type: ignore[arg-type]
    size = max(KEPT_BYTES // bytes_per_chunk, 1)
    if size >= chunks:
        return run(list(tokens), list(fixed), state)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tokens, *fixed, *state))
    outputs = []
    for start in range(0, chunks, size):
        here = [None if x is None else x[start : start + size] for x in tokens]
        if learns:
            y, *state = _Again.apply(run, (len(here), len(here) + len(fixed)), *here, *fixed, *state)
        else:
            y, state = run(here, list(fixed), state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


class _Again(torch.autograd.Function):
    """One group; keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, run: Run, cuts: tuple[int, int], *tensors: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.run, ctx.cuts = run, cuts
        return _flat(run, cuts, tensors)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Any, ...]:
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]  # cuts their own history off
            outputs = _flat(ctx.run, ctx.cuts, inputs)
        ys, dys = zip(*((y, dy) for y, dy in zip(outputs, outer, strict=True) if y.requires_grad), strict=True)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=differentiable, allow_unused=True))
        return None, None, *(next(found) if x is not None and x.requires_grad else None for x in inputs)


def _flat(run: Run, cuts: tuple[int, int], tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    a, b = cuts
    y, state = run(list(tensors[:a]), list(tensors[a:b]), list(tensors[b:]))
    return y, *state
