"""Tensor parallelism: ranks that read the same rows split the matrices of the model among them.

    x, whole     [ q k v | of its heads ]     attention of its heads     [ out | of its heads ]     sum over ranks
    x, whole     [ gate up | of its units ]   silu(gate) * up            [ down | of its units ]    sum over ranks

The maps are torch's ColwiseParallel and RowwiseParallel, the loss over a split vocabulary is its loss_parallel. A model
says what of it can be split (`splits`); the rest is whole on every rank, which does the same arithmetic there. Fast
weights of a split map are split as it is: a rank keeps and writes those of its hidden units.

Where two matrices lie one below the other in one weight (gate and up; q, k and v), a rank needs its part of each. The
rows of such a weight are sorted by ranks while it is split; checkpoints have them in their own order (`pieces.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from nestling.core.spread import Split
from nestling.train.parallel.splits import splits_of


def split_model(model: nn.Module, mesh: DeviceMesh) -> dict[str, Split]:
    """Split a model in place over a mesh of one dimension; every rank must have built the same one."""
    splits = splits_of(model, mesh.size())
    plan: dict[str, ParallelStyle] = {}
    with torch.no_grad():
        for name, split in splits.items():
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            weight: Any = module.weight
            weight.copy_(split.sorted(weight, mesh.size()))
            plan[path] = style_of(module, split)
    parallelize_module(model, mesh, plan, src_data_rank=None)
    return splits


def style_of(module: nn.Module, split: Split) -> ParallelStyle:
    """How torch runs a split map. Logits stay split: the loss needs no more than sums over the vocabulary."""
    if isinstance(module, nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate())
    if split.stays:
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return ColwiseParallel() if split.dim == 0 else RowwiseParallel()


def across(p: nn.Parameter) -> Shard | None:
    """The dimension along which FSDP cuts what tensor parallelism has split: the other one, so that neither needs to
    know of the other."""
    return Shard(1) if isinstance(p, DTensor) and p.placements[0].is_shard(0) else None


def check_across(model: nn.Module, shard: int) -> None:
    """Raise ValueError if FSDP cannot cut split matrices evenly along their other dimension."""
    for name, p in model.named_parameters():
        if across(p) and p.shape[1] % shard:
            raise ValueError(
                f"parallel.tensor: {name} has {p.shape[1]} inputs, which do not divide among {shard} ranks that share "
                f"a copy; use a parallel.shard that divides them"
            )


@torch.no_grad()
def same_everywhere(grads: list[Tensor], group: dist.ProcessGroup) -> None:
    """The mean over the ranks of a group, in place: gradients of what is whole are equal there but for kernels that
    add in no fixed order, and weights that are updated with equal bits stay equal."""
    kinds = {g.dtype for g in grads}
    for dtype in kinds:
        same = [g for g in grads if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in same])
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        for g, mean in zip(same, flat.split([g.numel() for g in same]), strict=True):
            g.copy_(mean.view_as(g))
