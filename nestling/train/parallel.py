"""A model spread over ranks with FSDP2: between steps every rank holds its part of weights and optimizer state.

For a step the weights are gathered, block by block, and stay until the gradients have been reduced (`gathered`);
this is FSDP2 with reshard_after_forward=False. Levels that learn need it: every segment of the text is a forward and
a backward pass of its own, ranks may cut their text at different places, and a write reads the weights outside of any
forward pass. Fast weights and contexts are plain tensors of a rank's own rows and are never exchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nestling.optim.sharded import whole
from nestling.train.config import ParallelConfig
from nestling.train.ranks import Ranks

ENTRIES = ("loss", "calibrate")  # methods of a model that count as its forward pass


def mesh_of(ranks: Ranks, config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """All ranks in one dimension, or copies times shards for hybrid sharding."""
    shard = config.shard or ranks.size
    if ranks.size % shard:
        raise ValueError(
            f"parallel.shard={shard} does not divide the {ranks.size} ranks; use a divisor, or 0 for all of them"
        )
    if shard == ranks.size:
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (ranks.size // shard, shard), mesh_dim_names=("copy", "shard"))


class Sharded:
    """A model sharded in place, a unit for every block and one for the rest. Every rank must have built the same one.

    Parameters without a dimension, such as learned rates, stay whole on every rank.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.model = model
        self.scalars = [p for p in model.parameters() if p.dim() == 0]
        alone = set(self.scalars)
        for module in [*model.blocks, model]:  # type: ignore[misc]
            fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=alone)
        # Weights are gathered throughout a step, so nothing hangs on the hook that this warning is about.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
        self.units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self.units:
            unit.set_reshard_after_backward(False, recurse=False)
        self.reduce_next(False)
        for name in ENTRIES:
            register_fsdp_forward_method(model, name)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While inside, the parameters of the model are whole, plain tensors."""
        pending = [unit.unshard(async_op=True) for unit in self.units]
        for handle in pending:
            if handle is not None:
                handle.wait()
        try:
            yield
        finally:
            for unit in self.units:
                unit.reshard()

    def reduce_next(self, reduce: bool) -> None:
        """Whether the next backward pass reduces gradients over ranks: only the last one of a step does.

        Levels that learn run backward passes of their own while they read; those never may.
        """
        for unit in self.units:
            unit.set_requires_gradient_sync(reduce, recurse=False)

    @torch.no_grad()
    def clip(self, longest: float) -> float:
        """Shorten the gradient to `longest`; returns its norm over all ranks before that."""
        for p in self.scalars:
            if p.grad is not None:  # FSDP2 does not see it
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())
        trained = [p for p in self.model.parameters() if p.grad is not None]
        kinds = [[p for p in trained if isinstance(p, DTensor) == spread] for spread in (True, False)]
        norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds if kind]
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, longest, norm)
        return float(norm)
