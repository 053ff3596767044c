"""Ranks: the processes of one run that torchrun started, and the few words they exchange about it.

    torchrun --nproc-per-node 2 -m nestling train recipes/lm_small.py:hope --out runs/two

Every rank runs the same program on its own rows. Tensors of the model travel inside FSDP2; what is exchanged here are
a few numbers per step (over gloo, on the host) and the decisions of rank 0, which alone writes into the run folder.
A single process is a `Ranks` of size 1, for which every exchange is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nestling.train.config import ParallelConfig
from nestling.train.parallel.meeting import meet

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    `tensor` neighbours, of successive numbers, share the same rows and split the matrices of the model; `sequence` such
    groups share the same rows, a stretch of tokens each.
    """

    rank: int = 0
    size: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.rank == 0

    @property
    def column(self) -> int:
        """Which stretch of its rows this rank reads."""
        return self.rank // self.tensor % self.sequence

    @property
    def part(self) -> int:
        """Which part of every split matrix this rank has."""
        return self.rank % self.tensor

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its rows, of those that share them."""
        return self.column == 0 and self.part == 0

    @property
    def after(self) -> int:
        """The rank that reads the stretch behind, or after the last one the first."""
        return self._at((self.column + 1) % self.sequence)

    @property
    def before(self) -> int:
        """The rank that reads the stretch before."""
        return self._at((self.column - 1) % self.sequence)

    def _at(self, column: int) -> int:
        """The rank that reads another stretch of the same rows, with the same part of the matrices."""
        return self.rank + (column - self.column) * self.tensor

    def rows(self, count: int) -> range:
        """The rows of this rank, of `count` in all."""
        share = self.sequence * self.tensor
        group, groups = self.rank // share, self.size // share
        return range(group * count // groups, (group + 1) * count // groups)

    def share(self, count: int) -> range:
        """The part of this rank, of `count` things that all ranks divide; tensor neighbours do the same ones."""
        group, groups = self.rank // self.tensor, self.size // self.tensor
        return range(group * count // groups, (group + 1) * count // groups)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over ranks of each number, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], op: Any) -> list[float]:
        if self.size == 1 or not values:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(held, op)
        return held.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, where alone it is called. What it raises there is raised on every rank."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except (OSError, ValueError, ImportError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def everyone(self, value: T) -> list[T]:
        """The value of every rank, in order of ranks."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found


@contextmanager
def watched(ranks: Ranks, remedy: Callable[[], str]) -> Iterator[None]:
    """While inside, the loss of another rank is a ConnectionError that says so, and what to do."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if ranks.size == 1 or not lost:
            raise
        raise ConnectionError(
            f"rank {ranks.rank} lost another rank, which was killed or is stuck; {remedy()}, "
            f"or let torchrun do it: --max-restarts 3 ({str(error).splitlines()[0][-100:]})"
        ) from error


def joined(sequence: int = 1, tensor: int = 1) -> Ranks:
    """The ranks of the process group that is there; without one, this process alone.

    Raises ValueError unless `sequence` times `tensor` divides their number.
    """
    there = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
    if size % (sequence * tensor):
        asked = [f"parallel.{name}={n}" for name, n in (("sequence", sequence), ("tensor", tensor)) if n > 1]
        raise ValueError(f"{' times '.join(asked)} does not divide the {size} ranks; use a divisor")
    return Ranks(rank, size, sequence, tensor)


@contextmanager
def ranks_of(config: ParallelConfig) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end. A group that is there already stays.

    Raises ValueError if their number is not the one that was asked for.
    """
    mine = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if mine:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        meet(backend, timedelta(seconds=config.timeout))
    ranks = joined(config.sequence, config.tensor)
    if config.ranks not in (0, ranks.size):
        raise ValueError(
            f"parallel.ranks={config.ranks}, but {ranks.size} processes are running; "
            f"start them with: torchrun --nproc-per-node {config.ranks} -m nestling train ... "
            f"(accelerate launch: --multi_gpu --num_processes {config.ranks}, which counts CPU processes too)"
        )
    yield ranks
    if mine:
        dist.barrier()  # a rank that leaves early would take the connection from the others
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The device of this rank: with torchrun, "cuda" is the card of its own number."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None and joined().size > 1 else device


def restarted() -> bool:
    """Whether torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
