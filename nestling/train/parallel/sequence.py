"""One long document over several ranks: each reads its own stretch, and the state goes on from rank to rank.

    rank 0   rows 0-3, tokens 0 ... T/2     rows 4-7, tokens 0 ... T/2      ...
                       | state                        | state
    rank 1             rows 0-3, tokens T/2 ... T     rows 4-7 ...          ...

A state is a value: what rank 1 gets is what one process would have in the middle of the document. Ranks work at the
same time on different parts of the rows (parallel.accumulate), as in a pipeline. Activations of a stretch lie on its
own rank; so a document may be as long as all ranks have memory for. Gradients: with outer="segment" nothing flows back
over the border of two segments, so the sum over the stretches is the gradient of the whole document.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nestling.core.state import Tree, flatten, unflatten
from nestling.data import Batch
from nestling.models import ModelConfig
from nestling.models.state import State
from nestling.train.parallel.ranks import Ranks


class Post:
    """Carries trees to the rank that reads on, without waiting until they are received."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.under_way: list[tuple[Any, Tensor]] = []

    def send(self, tree: Tree) -> None:
        """To the rank behind; from the last one back to the first."""
        named, skeleton = flatten(tree)
        kinds = [[name, str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in named.items()]
        head = torch.frombuffer(bytearray(json.dumps([skeleton, kinds]).encode()), dtype=torch.uint8)
        self._send(torch.tensor([len(head)]))
        self._send(head)
        for x in named.values():
            if x.numel():
                self._send(_as_bytes(x))

    def receive(self) -> Tree:
        """From the rank before."""
        head = self._receive(int(self._receive(1, torch.int64)), torch.uint8)
        skeleton, kinds = json.loads(bytes(head.tolist()))
        return unflatten({name: self._tensor(getattr(torch, dtype), shape) for name, dtype, shape in kinds}, skeleton)

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        for work, _ in self.under_way:
            work.wait()
        self.under_way = []

    def _send(self, x: Tensor) -> None:
        self.under_way.append((dist.isend(x, self.ranks.after), x))

    def _receive(self, count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        x = torch.empty(count, dtype=dtype, device=device)
        dist.recv(x, self.ranks.before)
        return x

    def _tensor(self, dtype: torch.dtype, shape: list[int]) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return self._receive(count * dtype.itemsize, torch.uint8, self.device).view(dtype).view(shape)


def _as_bytes(x: Tensor) -> Tensor:
    """The memory of a tensor: every dtype travels, whatever the backend knows of it."""
    return x.detach().contiguous().clone().view(-1).view(torch.uint8)


class Relay:
    """What a rank reads of a step, and from whom it takes the state. Without neighbours: everything, its own."""

    def __init__(self, model: Any, ranks: Ranks, device: torch.device) -> None:
        self.model, self.ranks = model, ranks
        self.post = Post(ranks, device)

    def mine(self, batch: Batch) -> Batch:
        """The stretch of the tokens that this rank reads; its last token is the first of the next rank."""
        length = (batch.tokens.shape[1] - 1) // self.ranks.sequence
        columns = slice(self.ranks.column * length, (self.ranks.column + 1) * length + 1)
        return Batch(tokens=batch.tokens[:, columns], new_document=batch.new_document[:, columns])

    def take(self, own: State | None) -> State | None:
        """The state that the stretch begins with: on the first rank its own."""
        return State(self.post.receive(), self.model) if self.ranks.column else own

    def give(self, state: State) -> None:
        """Hand on the state after the stretch; the last rank gives it back to the first."""
        if self.ranks.sequence > 1:
            self.post.send(state.tree)

    def end(self, states: list[State]) -> list[State]:
        """The states that the next step begins with, one for each part of the rows: the first rank gets them back."""
        if self.ranks.sequence > 1 and self.ranks.column == 0:
            states = [State(self.post.receive(), self.model) for _ in states]
        self.post.wait()
        return states


def check_sequence(config: ModelConfig, length: int, sequence: int) -> None:
    """Raise ValueError for a model whose gradient would flow from one stretch into the one before."""
    if sequence == 1:
        return
    finite = [int(period) for period in config.periods if math.isfinite(period)]
    if not finite or config.outer != "segment" or config.bptt:
        raise ValueError(
            f"parallel.sequence={sequence} needs a model whose gradient ends at each segment: a finite period, "
            f"outer='segment' and bptt=0; {config.name} has periods {config.periods}, outer={config.outer!r}, "
            f"bptt={config.bptt}"
        )
    if length % (sequence * finite[0]):
        unit = sequence * finite[0]
        raise ValueError(
            f"train.length={length} does not divide into {sequence} stretches of whole segments of {finite[0]} tokens; "
            f"use a multiple of {unit}, for example {max(1, round(length / unit)) * unit}"
        )
