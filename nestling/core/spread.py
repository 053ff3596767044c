"""Tensors spread over processes (DTensors), and how a module's matrices may be split among the ranks of a group.

Where nothing is spread every function here is the identity, and torch.distributed is not loaded to find that out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How a tensor may be split: along dimension `dim`, in which `blocks` matrices of one size lie side by side.

    A part has its share of every block. Modules that can be split say so in `splits(parts)`, by the names of their
    maps; `dim` is then that of a map's weight: 0 splits its outputs, 1 its inputs. `stays`: what the map gives stays a
    DTensor, because what reads it can.
    """

    dim: int
    blocks: int = 1
    stays: bool = False

    def cut(self, x: Tensor, part: int, parts: int) -> Tensor:
        """One of `parts` equal parts of x."""
        apart = x.unflatten(self.dim, (self.blocks, parts, -1))
        return apart.select(self.dim + 1, part).flatten(self.dim, self.dim + 1).contiguous()

    def sorted(self, x: Tensor, parts: int) -> Tensor:
        """All parts of x one after the other: the i-th of `parts` equal pieces is `cut(x, i, parts)`."""
        apart = x.unflatten(self.dim, (self.blocks, parts, -1))
        return apart.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2).contiguous()

    def pieces(self, x: Tensor, part: int, parts: int) -> list[tuple[int, Tensor]]:
        """What is in one piece in a part x: where in the whole it begins along `dim`, and a view of it."""
        size = x.shape[self.dim] // self.blocks
        views = x.split(size, self.dim) if size else (x,)
        return [((block * parts + part) * size, view) for block, view in enumerate(views)]


def is_spread(x: Tensor) -> bool:
    """Whether x is a DTensor."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole(x: Tensor) -> Tensor:
    """All of a tensor."""
    return x.full_tensor() if is_spread(x) else x  # type: ignore[attr-defined]


def local(x: Tensor) -> Tensor:
    """The part of this process, whose gradient is its part of the gradient."""
    return x.to_local() if is_spread(x) else x  # type: ignore[attr-defined]


def whole_norm(norms: Tensor, like: Tensor) -> Tensor:
    """Norms of all of what is spread as `like` is, from the norms of this process's part of it."""
    if not is_spread(like):
        return norms
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(norms.square(), mesh, [Partial()] * mesh.ndim).full_tensor().sqrt()


def by_parts(apply: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """A linear map of x that `apply` carries out with this process's part of its weight.

    x is a DTensor as torch's ColwiseParallel and RowwiseParallel hand it to a map: whole where the outputs of the
    weight are split, split along its last dimension where the inputs are; the result is what they expect of one.
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    outputs = weight.placements[0].is_shard(0)  # type: ignore[attr-defined]
    y = apply(x.to_local(grad_placements=[Partial()] if outputs else None))  # type: ignore[attr-defined]
    return DTensor.from_local(y, x.device_mesh, [Shard(y.dim() - 1) if outputs else Partial()])  # type: ignore[attr-defined]
