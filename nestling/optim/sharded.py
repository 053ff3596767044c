"""Whole matrices under FSDP2: bring together what is read as a matrix, compute, keep one's own part.

Element-wise arithmetic needs none of this: DTensors carry it out on their parts. Newton-Schulz needs all of a matrix.
`each_on_one` takes a round of matrices, as many as there are processes: every process gets one of them, computes, and
gives the others their parts of the result back. So the arithmetic is divided, and nobody holds more than one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nestling.core.spread import is_spread

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def part_like(made: Tensor, x: Tensor) -> Tensor:
    """`made`, which every process has, spread as x is: each keeps its own part, nothing is sent."""
    if not is_spread(x):
        return made
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(made.contiguous(), x.device_mesh, x.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_group(x: Tensor) -> dist.ProcessGroup | None:
    """The processes that hold some rows of x each, where that is how it is spread (copies apart); otherwise None."""
    if not is_spread(x):
        return None
    placements = x.placements  # type: ignore[attr-defined]
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or not placements[cut[0]].is_shard(0):
        return None
    return x.device_mesh.get_group(cut[0])  # type: ignore[attr-defined]


def rounds(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """What `each_on_one` takes at once: one matrix for each process, of about equal sizes."""
    kinds: dict[tuple[object, ...], list[Tensor]] = {}
    for x in sorted(matrices, key=Tensor.numel, reverse=True):
        kinds.setdefault((shard_group(x), x.dtype), []).append(x)
    for (group, _), same in kinds.items():
        size = group.size() if isinstance(group, dist.ProcessGroup) else 1
        yield from (same[i : i + size] for i in range(0, len(same), size))


def each_on_one(matrices: list[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`work` of each matrix, which keeps shape and dtype. The i-th is brought to the i-th process of their group."""
    from torch.distributed.tensor import DTensor

    group, held = shard_group(matrices[0]), [x.to_local() for x in matrices]  # type: ignore[attr-defined]
    assert group is not None and len(matrices) <= group.size()
    size, me = group.size(), group.rank()
    given = [x.numel() for x in held] + [0] * (size - len(held))
    taken = (
        [rows * matrices[me].shape[1:].numel() for rows in chunks(len(matrices[me]), size)] if me < len(held) else []
    )
    mine = exchanged(torch.cat([x.reshape(-1) for x in held]), given, taken or [0] * size, group)
    if taken:
        mine = work(mine.view(matrices[me].shape)).reshape(-1)
    back = exchanged(mine, taken or [0] * size, given, group).split(given)
    return [
        DTensor.from_local(part.view(old.shape), x.device_mesh, x.placements, shape=x.shape, stride=x.stride())  # type: ignore[attr-defined]
        for part, old, x in zip(back, held, matrices, strict=False)
    ]


def chunks(rows: int, size: int) -> list[int]:
    """How many rows each of `size` processes holds, as torch.chunk divides them."""
    most = -(-rows // size)
    return [max(0, min(rows, (i + 1) * most) - i * most) for i in range(size)]


def exchanged(x: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give the i-th process `given[i]` numbers of x, get `taken[i]` from it. Bytes travel: gloo knows few dtypes."""
    got, width = x.new_empty(sum(taken)), x.element_size()
    dist.all_to_all_single(
        got.view(torch.uint8),
        x.contiguous().view(torch.uint8),
        [width * count for count in taken],
        [width * count for count in given],
        group,
    )
    return got


def total(x: Tensor, like: DTensor) -> Tensor:
    """The sum of x over all processes among which `like` lies, in place."""
    for dimension in range(like.device_mesh.ndim):
        dist.all_reduce(x, group=like.device_mesh.get_group(dimension))
    return x
