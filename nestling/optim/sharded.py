"""Whole matrices under FSDP2: gather what is read as a matrix, compute, keep one's own part.

Element-wise arithmetic needs none of this: DTensors carry it out on their parts. Newton-Schulz needs all of a matrix,
so every process gathers it and computes the same orthogonal factor: one all-gather per matrix and step, and no
division of the arithmetic among the processes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes."""
    return x.full_tensor() if is_spread(x) else x  # type: ignore[attr-defined]


def part_like(made: Tensor, x: Tensor) -> Tensor:
    """`made`, which every process has, spread as x is: each keeps its own part, nothing is sent."""
    if not is_spread(x):
        return made
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(made.contiguous(), x.device_mesh, x.placements, src_data_rank=None)  # type: ignore[attr-defined]


def is_spread(x: Tensor) -> bool:
    """Whether x is a DTensor; torch.distributed is not loaded to find out."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)
