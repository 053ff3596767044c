"""A model spread over ranks with FSDP2: between steps every rank holds its part of weights and optimizer state.

For a step the weights are gathered, block by block, and stay until the gradients have been reduced (`gathered`);
this is FSDP2 with reshard_after_forward=False, and ranks need not agree on anything while they read: every segment of
the text is a forward and a backward pass of its own, and ranks may cut their text at different places. `reshard.py`
has the other way. Fast weights and contexts are plain tensors of a rank's own rows and are never exchanged.

With `parallel.tensor` the weights that FSDP2 gathers are a rank's parts of split matrices (tensor.py): two dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from nestling.core.spread import Split, local
from nestling.core.state import Tree, flatten, unflatten
from nestling.models.split import split_of_state
from nestling.optim.sharded import part_like
from nestling.train.config import ParallelConfig
from nestling.train.parallel.ranks import Ranks
from nestling.train.parallel.tensor import across, check_across, same_everywhere, split_model

ENTRIES = ("loss", "calibrate")  # methods of a model that count as its forward pass


def mesh_of(ranks: Ranks, config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """Copies, for hybrid sharding, times shards times parts of split matrices; a dimension of one rank is left out."""
    groups = ranks.size // ranks.tensor
    shard = config.shard or groups
    if groups % shard:
        of = f" groups of {ranks.tensor}" if ranks.tensor > 1 else ""
        raise ValueError(
            f"parallel.shard={shard} does not divide the {groups}{of} ranks; use a divisor, or 0 for all of them"
        )
    sizes = {"copy": groups // shard, "shard": shard, "tensor": ranks.tensor}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class Sharded:
    """A model sharded in place, a unit for every block and one for the rest. Every rank must have built the same one.

    Parameters without a dimension, such as learned rates, stay whole on every rank.
    """

    reshards = False  # whether a block is freed after each of its passes

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.model = model
        self.scalars = [p for p in model.parameters() if p.dim() == 0]
        alone = set(self.scalars)
        names = mesh.mesh_dim_names or ()
        self.tensor = mesh["tensor"] if "tensor" in names else None
        self.splits: dict[str, Split] = {} if self.tensor is None else split_model(model, self.tensor)
        check_across(model, mesh["shard"].size())
        data = mesh if self.tensor is None else mesh[tuple(name for name in names if name != "tensor")]
        for module in [*model.blocks, model]:  # type: ignore[misc]
            free = self.reshards and module is not model
            fully_shard(module, mesh=data, reshard_after_forward=free, ignored_params=alone, shard_placement_fn=across)
        # Nothing writes over what a block returns, so nothing hangs on the hook that this warning is about.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
        self.units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self.units:
            unit.set_reshard_after_backward(self.reshards and unit is not model, recurse=False)
        self.reduce_next(False)
        for name in ENTRIES:
            register_fsdp_forward_method(model, name)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While inside, the parameters of the model are whole, plain tensors; split ones lie over their group."""
        pending = [unit.unshard(async_op=True) for unit in self.units]
        for handle in pending:
            if handle is not None:
                handle.wait()
        try:
            with nullcontext() if self.tensor is None else loss_parallel():
                yield
        finally:
            for unit in self.units:
                unit.reshard()

    def in_step(self, share: float = 1.0) -> AbstractContextManager[None]:
        """While inside, ranks read their rows."""
        return self.gathered()

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
        if self.tensor is not None:
            unsplit = [p.grad for name, p in self.model.named_parameters() if name not in self.splits]
            same_everywhere([local(g) for g in unsplit if g is not None], self.tensor.get_group())
        kinds: dict[DeviceMesh | None, list[nn.Parameter]] = {}  # by the ranks over which a gradient lies
        for p in self.model.parameters():
            if p.grad is not None:
                kinds.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
        square = torch.zeros((), device=next(self.model.parameters()).device)
        for kind in kinds.values():
            grads = [p.grad for p in kind if p.grad is not None]
            mine = nn.utils.get_total_norm([local(g) for g in grads])
            square = square + mine.square() * (pieces_of(grads[0]) / dist.get_world_size())  # the others hold copies
        dist.all_reduce(square)
        norm = square.sqrt()
        for kind in kinds.values():
            nn.utils.clip_grads_with_norm_(kind, longest, norm)
        return float(norm)

    def part(self, name: str, made: Tensor, like: Tensor) -> Tensor:
        """This rank's part of `made`, a whole tensor as parameter `name` is one, spread as `like` is."""
        if self.tensor is not None and name in self.splits and made.shape == like.shape:
            made = self.splits[name].sorted(made, self.tensor.size())
        return part_like(made, like)

    def state_part(self, tree: Tree) -> Tree:
        """This rank's part of a state of its rows."""
        if self.tensor is None:
            return tree
        named, skeleton = flatten(tree)
        part, parts = self.tensor.get_local_rank(), self.tensor.size()
        cut = {name: split.cut(named[name], part, parts) for name, split in split_of_state(named, self.splits).items()}
        return unflatten(named | cut, skeleton)


def pieces_of(x: Tensor) -> int:
    """The number of ranks that have different parts of x."""
    if not isinstance(x, DTensor):
        return 1
    cut = [axis for axis, placement in enumerate(x.placements) if placement.is_shard()]
    return math.prod(x.device_mesh.size(axis) for axis in cut)
