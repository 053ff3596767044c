"""Checkpoints of tensor parallel runs: every rank writes the pieces that it has of a whole, in the order of the whole.

torch.distributed.checkpoint saves a DTensor as it lies. Where a rank's part of a tensor is several pieces of the whole
(its heads of q, of k and of v), or a plain tensor that is one of several parts (fast weights of split maps), these
planners name the place of each piece. So the files are those of any other run, and any number of ranks reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Shard

from nestling.core.spread import Split, local

Places = dict[torch.Size, Tensor]  # pieces of a whole by where they begin in it; views


@dataclass(frozen=True)
class Part:
    """Which of `parts` parts of a split tensor is here."""

    split: Split
    part: int
    parts: int

    def places(self, x: Tensor) -> Places:
        """The pieces in x, this rank's part of a whole: a DTensor that is cut evenly, or a plain tensor."""
        begin, held = [0] * x.dim(), local(x)
        if isinstance(x, DTensor):
            for axis, placement in enumerate(x.placements):
                if isinstance(placement, Shard) and placement.dim != self.split.dim:
                    begin[placement.dim] = x.device_mesh.get_local_rank(axis) * held.shape[placement.dim]
        found = Places()
        for first, piece in self.split.pieces(held, self.part, self.parts):
            begin[self.split.dim] = first
            found[torch.Size(begin)] = piece
        return found

    def size(self, x: Tensor) -> torch.Size:
        """The size of the whole that x is this rank's part of."""
        if isinstance(x, DTensor):
            return x.shape
        return torch.Size(n * self.parts if i == self.split.dim else n for i, n in enumerate(x.shape))

    def of(self, size: torch.Size) -> torch.Size:
        """The size of this part of a whole."""
        return torch.Size(n // self.parts if i == self.split.dim else n for i, n in enumerate(size))


class _Places:
    """The pieces of the tensors that have a `Part`, found once for each set of tensors."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts
        self.found: dict[str, Places] = {}

    def find(self, held: Mapping[str, object]) -> None:
        self.found = {n: self.parts[n].places(x) for n, x in held.items() if n in self.parts and isinstance(x, Tensor)}

    def piece(self, index: MetadataIndex) -> Tensor | None:
        if index.fqn not in self.found:
            return None
        assert index.offset is not None
        return self.found[index.fqn][index.offset]


class SavePieces(DefaultSavePlanner):
    """Saves tensors that have a `Part` piece by piece, and all others as torch does."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.places = _Places(parts)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.places.find(self.state_dict)
        items = [item for item in plan.items if item.index.fqn not in self.places.found]
        for name, places in self.places.found.items():
            size = self.places.parts[name].size(self.state_dict[name])
            items += [_written(name, begin, piece, size) for begin, piece in places.items()]
        self.plan = replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> object:
        piece = self.places.piece(index)
        return super().lookup_object(index) if piece is None else piece


class LoadPieces(DefaultLoadPlanner):
    """Loads tensors that have a `Part` piece by piece, in place."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.places = _Places(parts)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self.places.find(self.state_dict)
        others = {name: x for name, x in self.state_dict.items() if name not in self.places.found}
        plan = create_default_local_load_plan(others, self.metadata, True)
        items = list(plan.items)
        for name, places in self.places.found.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            wanted = [ChunkStorageMetadata(begin, piece.shape) for begin, piece in places.items()]
            items += create_read_items_for_chunk_list(name, saved, wanted)
        return replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        piece = self.places.piece(index)
        return super().lookup_tensor(index) if piece is None else piece


def _written(name: str, begin: torch.Size, piece: Tensor, size: torch.Size) -> WriteItem:
    """One piece of a tensor."""
    chunk = ChunkStorageMetadata(begin, piece.shape)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(piece), size=size)
    return WriteItem(index=MetadataIndex(name, begin), type=WriteItemType.SHARD, tensor_data=data)
