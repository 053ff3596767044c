"""A model whose blocks are gathered for each of their passes only (ZeRO-3), by ranks that read in step.

    forward    gather block 0, run it, free it; gather block 1, ...
    backward   gather block n, and block n-1 meanwhile; run n, reduce its gradients into each rank's part, free it; ...

This is FSDP2 with reshard_after_forward=True. Embedding, last norm and head stay whole while a step lasts. A reader
makes many passes of its own (a forward and a backward pass per segment, more where a segment is read again): ranks
agree on each of them (`InStep`), and every backward pass of the parameters reduces. A write needs of the weights no
more than their lengths, which are added up once per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nestling.models import ModelConfig
from nestling.models.company import ALONE, Company
from nestling.models.reader import GRAPH_TOKENS
from nestling.train.parallel.fsdp import Sharded
from nestling.train.parallel.ranks import Ranks


class InStep(Company):
    """The ranks of a run: each reads its own rows, and all make the same passes."""

    def __init__(self, ranks: Ranks, share: float) -> None:
        self.ranks, self.share = ranks, share

    def any(self, *flags: bool) -> list[bool]:
        return [found > 0 for found in self.ranks.largest([float(flag) for flag in flags])]

    def least(self, number: int) -> int:
        return -int(self.ranks.largest([-number])[0])


class Resharded(Sharded):
    """`Sharded`, with one or two blocks gathered at a time."""

    reshards = True

    def __init__(self, model: nn.Module, mesh: DeviceMesh, ranks: Ranks) -> None:
        self.ranks = ranks
        super().__init__(model, mesh)
        self.blocks: list[Any] = [unit for unit in self.units if unit is not model]
        for block, before in zip(self.blocks, [model, *self.blocks], strict=False):
            block.set_modules_to_backward_prefetch([before])
        self.maps = model.written_maps()  # type: ignore[operator]

    @contextmanager
    def in_step(self, share: float = 1.0) -> Iterator[None]:
        lengths = self.lengths()
        for m, length in zip(self.maps, lengths, strict=True):
            m.noted = length
        self.model.unshard()  # type: ignore[operator]
        self.model.company = InStep(self.ranks, share)  # type: ignore[assignment]
        try:
            yield
        finally:
            self.model.company = ALONE  # type: ignore[assignment]
            for m in self.maps:
                m.noted = None
            for unit in self.units:
                unit.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self.keep(True)
        try:
            with super().gathered():
                yield
        finally:
            self.keep(False)

    def reduce_next(self, reduce: bool) -> None:
        """Blocks reduce in each backward pass of the parameters: none keeps whole gradients."""
        self.model.set_requires_gradient_sync(reduce, recurse=False)  # type: ignore[operator]

    def keep(self, whole: bool) -> None:
        """Whether the weights of a block stay after a pass."""
        for block in self.blocks:
            block.set_reshard_after_forward(not whole, recurse=False)
            block.set_reshard_after_backward(not whole, recurse=False)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """The Frobenius norm of the weight of each map, over all ranks."""
        if not self.maps:
            return torch.zeros(0)
        weights: list[Any] = [m.weight for m in self.maps]
        squares = torch.stack([weight.to_local().square().sum() for weight in weights])
        mesh = weights[0].device_mesh
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
        return squares.sqrt()


def check_reshard(config: ModelConfig, tokens: int) -> None:
    """Raise ValueError for a model whose gradient is taken where its weights are freed; `tokens` are read at once."""
    fault = ""
    if config.bptt:
        fault = f"bptt=0, {config.name} has bptt={config.bptt}"
    elif config.outer == "sequence" and tokens > GRAPH_TOKENS:
        fault = f"at most {GRAPH_TOKENS} tokens at once with outer='sequence', a rank reads {tokens} of {config.name}"
    if fault:
        raise ValueError(f"parallel.reshard needs {fault}; use outer='segment' and bptt=0, or leave it out")
