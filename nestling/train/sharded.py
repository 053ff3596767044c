"""Checkpoints of several ranks: every rank writes its own part while training goes on (torch.distributed.checkpoint).

    step-00000100/   __0_0.distcp, __1_0.distcp, .metadata    tensors, as torch writes them
                     trees.json                               what stands around the tensors, positions, identity
                     manifest.json                            size of every file; written last

Weights and optimizer state are saved as the DTensors they are, and are spread anew on load, over any number of ranks.
States of sequences are saved as blocks of rows; a rank loads the blocks that hold its rows. The folder has its final
name only when all ranks are done. torch's `.metadata` is a pickle: a folder from elsewhere needs `trust`, as always.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from nestling.core.state import Tree, flatten, select_rows, stack_rows, unflatten
from nestling.models.split import split_of_state
from nestling.models.state import State
from nestling.train.checkpoint import DamagedCheckpoint, Parts, load_weights, retire
from nestling.train.config import RunConfig
from nestling.train.files import sync_folder, write_file
from nestling.train.optimizer import with_tuples
from nestling.train.parallel.pieces import LoadPieces, Part, SavePieces
from nestling.train.parallel.ranks import Ranks
from nestling.train.random_state import random_state
from nestling.train.trainer import Trainer

FORMAT = "nestling-sharded-1"


class ShardedCheckpoints:
    """Writes the checkpoints of a run in the background, one at a time. Every rank calls every method.

    Args:
        folder: where they lie. identity: what the run is. config: how many are kept, how long ranks wait.
    """

    def __init__(self, folder: Path, ranks: Ranks, identity: dict[str, Any], config: RunConfig) -> None:
        self.folder, self.ranks, self.identity, self.kept = folder, ranks, identity, config.train
        limit = timedelta(seconds=config.parallel.timeout)
        self.group = dist.new_group(backend="gloo", timeout=limit)  # its own, since another thread talks in it
        self.pending: tuple[Future[Any], int, dict[str, Any]] | None = None

    def save(self, trainer: Trainer) -> None:
        """Begin a checkpoint of this moment; what changes later does not reach it."""
        self.wait()
        step, first, stop = trainer.step, trainer.stream.only[0], trainer.stream.only[-1] + 1
        shared, skeleton = flatten(_shared(trainer))
        holds = trainer.state if trainer.ranks.column == 0 else None
        state, of_state = flatten(None if holds is None else holds.tree)
        split = _split_state(trainer, state)
        if trainer.ranks.part:  # what is not split, the first of the group holds
            state = {name: x for name, x in state.items() if name in split}
        random, of_random = flatten(random_state())
        rows = [first, stop if trainer.ranks.speaks else first]  # what neighbours share, the first of them holds
        own = {"rows": rows, "state": of_state, "random": of_random}
        trees = {
            "shared": skeleton,
            "ranks": self.ranks.everyone(own),
            "progress": trainer.progress,
            "identity": self.identity,
        }
        named = {f"shared.{name}": x for name, x in shared.items()}
        named |= {f"rows.{first}.{name}": x for name, x in state.items()}
        named |= {f"random.{self.ranks.rank}.{name}": x for name, x in random.items()}
        parts = _parts_of_shared(trainer, shared) | {f"rows.{first}.{name}": part for name, part in split.items()}
        writer, planner = dcp.FileSystemWriter(self._writing(step)), SavePieces(parts)
        begun = dcp.async_save(named, storage_writer=writer, planner=planner, process_group=self.group)
        assert isinstance(begun, Future)
        self.pending = begun, step, trees

    def settle(self) -> None:
        """Give the checkpoint that is being written its name, if it is complete. Waits for nothing."""
        if self.pending is not None and self.pending[0].done():
            self.wait()

    def wait(self) -> None:
        """The same, once it is. Raises OSError if it could not be written; the earlier ones are untouched then."""
        if self.pending is None:
            return
        (begun, step, trees), self.pending = self.pending, None
        try:
            begun.result()
        except (dcp.api.CheckpointException, RuntimeError) as error:
            raise OSError(f"the checkpoint of step {step} could not be written: {_first_line(error)}") from error
        if self.ranks.first:
            self._publish(step, trees)

    def _publish(self, step: int, trees: dict[str, Any]) -> None:
        writing, final = self._writing(step), self.folder / f"step-{step:08d}"
        content = json.dumps(trees).encode()
        write_file(writing / "trees.json", content)
        sizes = {path.name: path.stat().st_size for path in sorted(writing.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": sizes, "sha256": hashlib.sha256(content).hexdigest()}
        write_file(writing / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(writing)
        os.rename(writing, final)
        sync_folder(self.folder)
        retire(self.folder, keep=self.kept.keep, keep_every=self.kept.keep_every)

    def _writing(self, step: int) -> Path:
        return self.folder / f".writing-{step:08d}"


def _shared(trainer: Trainer) -> Tree:
    """What all ranks hold together."""
    return {
        "model": dict(trainer.model.state_dict()),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
    }


def read_sharded(path: Path) -> Parts:
    """Progress and identity of a checkpoint all of whose files are there, and its path under "sharded".

    Raises DamagedCheckpoint if a file is missing or has another size.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        content = (path / "trees.json").read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise ValueError("the content of trees.json changed")
        for name, size in manifest["files"].items():
            here = (path / name).stat().st_size
            if here != size:
                raise ValueError(f"{name} has {here} of {size} bytes")
        trees = json.loads(content)
        return {"sharded": str(path), "progress": trees["progress"], "identity": trees["identity"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {error}") from error


def load_sharded(path: Path, trainer: Trainer) -> None:
    """Go on where the ranks that wrote a checkpoint were, whatever their number. Every rank calls it."""
    trees = json.loads((path / "trees.json").read_bytes())
    mine = range(trainer.stream.only[0], trainer.stream.only[-1] + 1)
    held_rows = [rank for rank in trees["ranks"] if rank["rows"][0] < rank["rows"][1]]
    blocks = [rank for rank in held_rows if rank["rows"][0] < mine.stop and mine.start < rank["rows"][1]]
    rank = trainer.ranks.rank % len(trees["ranks"])
    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata

    held, _ = flatten(_shared(trainer))
    wanted = {f"shared.{name}": x for name, x in held.items()}
    _refuse_others(path, wanted, sizes)
    parts = _parts_of_shared(trainer, held)
    for begins in [f"rows.{block['rows'][0]}." for block in blocks]:
        names = [name.removeprefix(begins) for name in sizes if name.startswith(begins)]
        parts |= {f"{begins}{name}": part for name, part in _split_state(trainer, names).items()}
        wanted |= {n: _room(about, parts.get(n)) for n, about in sizes.items() if n.startswith(begins)}
    wanted |= {name: _room(about) for name, about in sizes.items() if name.startswith(f"random.{rank}.")}
    reader, planner = dcp.FileSystemReader(path), LoadPieces(parts)
    dcp.load(wanted, storage_reader=reader, planner=planner, no_dist=trainer.ranks.size == 1)

    shared = unflatten(_below("shared.", wanted), trees["shared"])
    load_weights(trainer.model, shared["model"])
    optimizer, groups = shared["optimizer"], get_optimizer_state_dict(trainer.model, trainer.optimizer)["param_groups"]
    optimizer["param_groups"] = with_tuples(optimizer["param_groups"], groups)  # type: ignore[arg-type]
    set_optimizer_state_dict(trainer.model, trainer.optimizer, optimizer)
    random = unflatten(_below(f"random.{rank}.", wanted), trees["ranks"][rank]["random"])
    trainer.go_on(_rows(mine, blocks, wanted, trainer), random, trees["progress"])


def weights_of(path: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, for one process."""
    begins = "shared.model."
    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {name: _room(about) for name, about in sizes.items() if name.startswith(begins)}
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return _below(begins, wanted)


def _rows(mine: range, blocks: list[dict[str, Any]], held: dict[str, Tensor], trainer: Trainer) -> State | None:
    """The state of the rows `mine`, out of the blocks that hold them."""
    trees, counts = [], []
    assert blocks, f"no state of rows {mine}"
    for block in blocks:
        first, stop = block["rows"]
        tree = unflatten(_below(f"rows.{first}.", held), block["state"])
        if tree is None:
            return None
        rows = range(max(first, mine.start) - first, min(stop, mine.stop) - first)
        trees.append(tree if len(rows) == stop - first else select_rows(tree, list(rows)))
        counts.append(len(rows))
    return State(trees[0] if len(trees) == 1 else stack_rows(trees, counts), trainer.model)


def _room(about: Any, part: Part | None = None) -> Tensor:
    """An empty tensor for a saved one, or for the part of it that is here."""
    size = about.size if part is None else part.of(about.size)
    return torch.empty(size, dtype=about.properties.dtype)


def _parts_of_shared(trainer: Trainer, shared: dict[str, Tensor]) -> dict[str, Part]:
    """The weights whose part here is not one piece, and what is kept for them."""
    found: dict[str, Part] = {}
    for name, split in trainer.layout.splits.items():
        if split.blocks > 1:
            names = [n for n in shared if n == f"model.{name}" or n.startswith(f"optimizer.state.{name}.")]
            part = Part(split, trainer.ranks.part, trainer.ranks.tensor)
            found |= {f"shared.{n}": part for n in names if shared[n].dim() > split.dim}  # a count of steps is whole
    return found


def _split_state(trainer: Trainer, names: Iterable[str]) -> dict[str, Part]:
    """Of the tensors of a state those that are split."""
    found = split_of_state(names, trainer.layout.splits)
    return {name: Part(split, trainer.ranks.part, trainer.ranks.tensor) for name, split in found.items()}


def _below(begins: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(begins): x for name, x in named.items() if name.startswith(begins)}


def _refuse_others(path: Path, wanted: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    """Raise ValueError if what is held is not what was saved."""
    for name, x in wanted.items():
        if name not in sizes or sizes[name].size != x.shape:
            saved = f"has shape {tuple(sizes[name].size)}" if name in sizes else "is not there"
            raise ValueError(
                f"checkpoint {path} does not fit: {name.removeprefix('shared.')} {saved}, the run has "
                f"{tuple(x.shape)}; use the version of nestling that wrote it"
            )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
