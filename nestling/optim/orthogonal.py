"""What Muon and M3 share: parameters as matrices, batches of equal shape, and one Newton-Schulz for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from nestling.core.spread import whole
from nestling.ops import dispatch
from nestling.ops.newton_schulz.batched import ALONE
from nestling.optim.base import Group, Optimizer, matrix
from nestling.optim.sharded import each_on_one, part_like, rounds, shard_group

BATCH_BYTES = 1 << 27  # of matrices that are orthogonalised together; a batch this large fills any device
ADJUSTMENTS = (None, "original", "match_rms_adamw")


def nesterov(grads: list[Tensor], momenta: list[Tensor], beta: float) -> list[Tensor]:
    """(1 - beta) gradient + beta momentum, one by one: torch 2.11 cannot shard the form for lists."""
    return [torch.lerp(g, m, beta) for g, m in zip(grads, momenta, strict=True)]


class MatrixOptimizer(Optimizer):
    """An optimizer that reads whole matrices. `update` gets parameters of one matrix shape, or a round of DTensors.

    Convolution kernels (out, in, ...) count as (out, in ...); vectors and scalars are refused. foreach=False gives
    each matrix a batch of its own. Under FSDP2 each matrix is orthogonalised by one process.
    """

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError(f"ns_steps is {group['ns_steps']}; use 0 ... 99, 5 are enough for the quintic polynomial")
        if group["adjust_lr_fn"] not in ADJUSTMENTS:
            raise ValueError(f'adjust_lr_fn is {group["adjust_lr_fn"]!r}; use None, "original" or "match_rms_adamw"')

    def check(self, p: Tensor, group: Group) -> None:
        if p.dim() < 2:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not a matrix; {type(self).__name__} is for hidden matrices: "
                "give the others to AdamW, as nestling.optim.param_groups(model) does in one call"
            )

    def parts(self, params: list[Tensor], group: Group) -> Iterable[list[Tensor]]:
        spread = [p for p in params if shard_group(p) is not None]
        here = [p for p in params if shard_group(p) is None] if spread else params
        own = super().parts(here, group) if group["foreach"] is False else equal_shapes(here)
        return chain(rounds(spread), own)


def equal_shapes(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters that are matrices of one shape, on one device and of one dtype."""
    found: dict[tuple[object, ...], list[Tensor]] = {}
    for p in params:
        found.setdefault((matrix_shape(p), p.device, p.dtype), []).append(p)
    for same in found.values():
        size = matrices_at_once(same[0])
        yield from (same[i : i + size] for i in range(0, len(same), size))


def matrices_at_once(p: Tensor) -> int:
    """How many of p's shape one batch holds. A large one on a CPU is alone: it fills the caches by itself, and every
    pass over it finds it there."""
    if p.device.type == "cpu" and p.numel() >= ALONE:
        return 1
    return max(1, BATCH_BYTES // max(1, p.numel() * p.element_size()))


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a parameter."""
    return p.shape[0], math.prod(p.shape[1:])


def orthogonalize(matrices: list[Tensor], group: Group, eps: float) -> list[Tensor]:
    """Newton-Schulz of each, all of one shape or a round; in `ns_dtype`, by default the device's fastest."""
    first = matrices[0]
    dtype = ns_dtype(first, group)

    def factor(x: Tensor) -> Tensor:
        made = dispatch.newton_schulz(matrix(x)[None], group["ns_steps"], group["ns_coefficients"], eps=eps)
        return made.reshape(x.shape)

    if shard_group(first) is not None:
        return each_on_one([x.to(dtype) for x in matrices], factor)
    stack = torch.empty(len(matrices), *matrix_shape(first), dtype=dtype, device=first.device)
    torch._foreach_copy_(list(stack.unbind()), [matrix(whole(x)) for x in matrices])
    made = dispatch.newton_schulz(stack, group["ns_steps"], group["ns_coefficients"], eps=eps)
    return [part_like(o.reshape(x.shape), x) for o, x in zip(made, matrices, strict=True)]


def ns_dtype(x: Tensor, group: Group) -> torch.dtype:
    """The group's dtype for Newton-Schulz; float64 stays, which makes the optimizers exact for tests."""
    if group["ns_dtype"] is not None:
        return getattr(torch, group["ns_dtype"])
    return x.dtype if x.dtype == torch.float64 else dispatch.newton_schulz_dtype(x.device)


def adjusted_rate(p: Tensor, group: Group) -> float:
    """The rate at which an orthogonal matrix of p's shape is added, by the two conventions of torch.optim.Muon."""
    outputs, inputs = matrix_shape(p)
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return group["lr"] * 0.2 * math.sqrt(max(outputs, inputs))
    return group["lr"] * math.sqrt(max(1, outputs / inputs))


def add_scaled(params: list[Tensor], updates: list[Tensor], group: Group) -> None:
    """W <- W - adjusted rate * update."""
    for p, update in zip(params, updates, strict=True):
        p.add_(update, alpha=-adjusted_rate(p, group))
