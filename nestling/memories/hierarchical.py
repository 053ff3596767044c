"""Titans for training in parallel over the sequence: one memory of the whole text, one that starts anew in every shard.

A memory that is never reset must be written chunk after chunk. Here only the global one is, in few large chunks; the
local one, with small chunks, is back at its learned initial state at every shard border, so no shard waits for another:
all shards of a call stand beside each other in the batch. Source: TNT, arXiv 2511.07343.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nestling.core.level import Level
from nestling.core.state import map_tensors, select_rows, stack_rows, state_class, where_rows
from nestling.memories.chunked import KeyValueMemory, KeyValueState
from nestling.memories.frame import Frame, static_level


@state_class
class HierarchicalState:
    """One row per sequence."""

    tail: Tensor  # (B, width-1, 3D) last inputs of the convolution
    whole: KeyValueState  # of the global memory
    local: KeyValueState
    phase: Tensor  # (B,) int64, tokens in the open shard


class HierarchicalTitans(nn.Module):
    """A global and a local Titans memory, read together. `y, state = layer(x, state=None, lengths=None)`.

        y_t = G_t(q_t) + L_t(q_t),   L is reset to its initial state after every `shard` tokens

    Both are written as in `TitansMemory`, with the same q, k, v and gates of their own. DEVIATION: TNT reads the local
    memory at the query projected on the keys it has seen (Q-K projection), allows several local memories, and
    fine-tunes with smaller local chunks; here both memories are read at q, there is one local memory, and what is
    trained is what runs. The global read sees the writes of its own chunk, as everywhere in this library.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: int = 2,
        chunk_size: int = 16,
        *,
        global_chunk: int = 256,
        shard: int = 2048,
        memory: Literal["mlp", "linear"] = "mlp",
        eta_max: float = 1.0,
        momentum: float = 0.5,
        half_life: float = 2048,
        decay_to: Literal["initial", "zero"] = "initial",
    ) -> None:
        """chunk_size: of the local memory, global_chunk: of the global one, shard: between resets, all in tokens; the
        rest as in `TitansMemory`, for both memories."""
        super().__init__()
        for name, size in {"global_chunk": global_chunk, "shard": shard}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; use at least 1 token")
        self.shard, self.frame = shard, Frame(dim, heads)
        self.whole, self.local = (
            KeyValueMemory(
                dim,
                heads,
                expansion,
                size,
                memory=memory,
                eta_max=eta_max,
                momentum=momentum,
                half_life=half_life,
                decay_to=decay_to,
            )
            for size in (global_chunk, chunk_size)
        )

    def forward(
        self, x: Tensor, state: HierarchicalState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, HierarchicalState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memories run in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        q, k, v, tail = self.frame.enter(x, None if state is None else state.tail, lengths)
        o, whole = self.whole(x, q, k, v, None if state is None else state.whole, lengths)
        inputs = [x, q, k, v]
        if state is None:
            read, local = self._shards(inputs, None, 0, lengths)
            phase = torch.zeros(len(x), dtype=torch.long, device=x.device)
        else:
            advance = self._token if x.shape[1] == 1 else self._rows
            read, local = advance(inputs, state.local, state.phase, lengths)
            phase = state.phase
        phase = (phase + (x.shape[1] if lengths is None else lengths.to(phase))) % self.shard
        return self.frame.leave(o + read, x), HierarchicalState(tail, whole, local, phase)

    def _token(
        self, inputs: list[Tensor], local: KeyValueState, phase: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, KeyValueState]:
        """One token: a computation of fixed shape. The rows whose shard it fills start anew."""
        read, local = self.local(*inputs, local, lengths)
        reached = phase + (1 if lengths is None else lengths.to(phase))
        return read, where_rows(reached == self.shard, _fresh(local, len(phase)), local)

    def _rows(
        self, inputs: list[Tensor], local: KeyValueState, phase: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, KeyValueState]:
        """Rows at different places of their shard are read one group after the other."""
        phases = phase.unique().tolist()
        if len(phases) == 1:
            return self._shards(inputs, local, phases[0], lengths)
        groups = [(phase == p).nonzero()[:, 0] for p in phases]
        reads, states = [], []
        for p, rows in zip(phases, groups, strict=True):
            mine = None if lengths is None else lengths.to(rows.device)[rows]
            read, state = self._shards([z[rows] for z in inputs], select_rows(local, rows), p, mine)
            reads.append(read)
            states.append(state)
        order = torch.cat(groups).argsort()
        return torch.cat(reads)[order], select_rows(stack_rows(states, [len(g) for g in groups]), order)

    def _shards(
        self, inputs: list[Tensor], local: KeyValueState | None, phase: int, lengths: Tensor | None
    ) -> tuple[Tensor, KeyValueState]:
        """The rest of the open shard, then whole shards side by side, then the beginning of the next one.

        local: the state of a shard with `phase` tokens, the same in all rows; None at its start.
        """
        rows, tokens = inputs[0].shape[:2]
        reads: list[Tensor] = []
        ends: list[KeyValueState] = []

        def run(start: int, count: int, width: int, state: KeyValueState | None) -> None:
            """`count` pieces of `width` tokens beside each other, all from the same kind of state."""
            part = [z[:, start : start + count * width].unflatten(1, (count, width)).flatten(0, 1) for z in inputs]
            n = None
            if lengths is not None:
                places = start + width * torch.arange(count, device=lengths.device)
                n = (lengths[:, None] - places).clamp(0, width).flatten()
            read, end = self.local(*part, state, n)
            reads.append(read.unflatten(0, (rows, count)).flatten(1, 2))
            ends.append(end)

        begin = min(self.shard - phase, tokens) if phase else 0
        if begin:
            run(0, 1, begin, local)
        count = (tokens - begin) // self.shard
        if count:
            run(begin, count, self.shard, None)
        stop = begin + count * self.shard
        if stop < tokens or not tokens:
            run(stop, 1, tokens - stop, local if phase and not tokens else None)
        read = torch.cat(reads, 1)
        if lengths is None:  # all rows stop at the same place, in the last piece
            return read, ends[-1] if (phase + tokens) % self.shard else _fresh(ends[-1], rows)
        return read, self._end(ends, rows, (1 if begin else 0, count), phase + lengths.to(read.device))

    def _end(self, ends: list[KeyValueState], rows: int, pieces: tuple[int, int], reached: Tensor) -> KeyValueState:
        """Each row's state where it stops: fresh at a shard border, else that of the piece it stops in.

        pieces: how many open and how many whole shards a row had; reached (B,): tokens since the first of them began.
        """
        opened, count = pieces
        row, piece = torch.arange(rows, device=reached.device), reached // self.shard
        whole = rows * opened + row * count + piece - opened
        later = rows * (opened + count) + row
        index = torch.where(piece < opened, row, torch.where(piece < opened + count, whole, later))
        sizes = [len(end.count) for end in ends]
        chosen = select_rows(stack_rows(ends, sizes), index.clamp(max=sum(sizes) - 1))
        return where_rows(reached % self.shard == 0, _fresh(chosen, rows), chosen)

    def levels(self) -> list[Level]:
        """Both memories, and the projections around them."""
        whole = self.whole.level("global memory", beside=self.frame.tail_bytes() + 8)
        local = self.local.level("local memory", 0, f"initialisation (meta-learned), anew every {self.shard} tokens")
        return [whole, local, static_level(self, whole.parameters + local.parameters)]


def _fresh(like: KeyValueState, rows: int) -> KeyValueState:
    """The state before the first token."""
    return map_tensors(lambda x: x.new_zeros(rows, *x.shape[1:]), like)
