"""Decoder: one token per sequence and call at constant cost, with the weights as they are.

What a model has learned stays fixed while it decodes: no clock moves and no segment grows, so a step is the same few
operations on the same shapes whatever the age of a sequence, and waits for nothing. A CUDA graph can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.state import Tree, map_nodes, map_tensors, replace, tensors
from ..memories.attention_cache import AttentionState, OpenCache
from ..memories.continuum import Reading, continuum_levels, current, once, reading
from .state import Carried, State

if TYPE_CHECKING:
    from .lm import LanguageModel

_ROOM = 256  # tokens that a cache without a window is first opened for


class Decoder:
    """Continues the sequences of a state token by token; `state` is what the model has read so far, at any time.

    Gives the logits and the state of `model(tokens[:, None], state, learn=False)`, for rows of any age.

    Args:
        model: a LanguageModel. state: what its sequences have read; it is not changed.
        room: tokens to make place for at once; more are made place for as they come.
        graph: replay each step as one CUDA graph.
    Raises ValueError for a graph without CUDA.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: LanguageModel, state: State, *, room: int = _ROOM, graph: bool = False) -> None:
        tree = model._tree(state, state.rows)
        assert tree is not None
        self.model, self.start, self.room = model, tree, max(1, room)
        if graph and tree.tokens.device.type != "cuda":
            raise ValueError(
                f"graph=True needs a state on a CUDA device, this one is on {tree.tokens.device}; leave it out"
            )
        self.graph = graph
        self.now = once(current(continuum_levels(model), tree.fast))
        self.count = torch.zeros_like(tree.tokens)
        self._replay: _Graph | None = None
        self.mixers: list[Tree] = self._begun(tree.mixers)
        self._open()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Read one token per row, tokens (B,), and return the logits (B, V) of the next.

        Rows whose `active` (B,) is False read nothing: their state stays, their logits mean nothing.
        """
        if self.left == 0:
            self.room *= 2
            self._open()
        self.left -= 1
        self.count = self.count + (1 if active is None else active)
        if self._replay is not None:
            return self._replay(tokens, active)
        logits, self.mixers = decode(self.model, self.now, tokens, self.mixers, active)
        return logits

    @property
    @torch.inference_mode(False)
    def state(self) -> State:
        """The state after all tokens so far, as a value."""
        segment = self.start.segment
        if segment is not None:
            segment = replace(segment, sealed=segment.sealed | ((self.count > 0) & (segment.length > 0)))
        mixers = map_nodes(OpenCache, OpenCache.closed, self.mixers)
        if self._replay is not None:
            mixers = map_tensors(Tensor.clone, mixers)
        return State(Carried(mixers, self.start.fast, segment, self.start.tokens + self.count), self.model)

    def _begun(self, mixers: list[Tree]) -> list[Tree]:
        """The mixers; where they have read nothing, as an empty call leaves them."""
        if all(mixer is not None for mixer in mixers):
            return mixers
        return self.model.body(self.count.new_zeros(len(self.count), 0), mixers)[1]

    def _open(self) -> None:
        """Make place for more tokens. Only a cache without a window grows; each time it gains twice as much."""
        self.left = self.room
        opened = map_nodes((AttentionState, OpenCache), lambda cache: cache.opened(self.room), self.mixers)
        if self.graph and (self._replay is None or _shapes(opened) != _shapes(self.mixers)):
            self._replay = _Graph(self.model, self.now, opened)
        self.mixers = opened if self._replay is None else self._replay.mixers


def decode(
    model: LanguageModel, now: Reading, tokens: Tensor, mixers: list[Tree], active: Tensor | None = None
) -> tuple[Tensor, list[Tree]]:
    """One step: tokens (B,) -> logits (B, V) and the mixers after it. `active` (B,) bool, None = every row reads."""
    with reading(now):
        hidden, mixers = model.body(tokens[:, None], mixers, None if active is None else active.long())
        return model.head(hidden[:, 0]), mixers


class _Graph:
    """`decode` as one CUDA graph over buffers of its own: inputs go in, are replayed over, and the logits are copied
    out; the mixers after the step are written over those before it."""

    def __init__(self, model: LanguageModel, now: Reading, mixers: list[Tree]) -> None:
        self.mixers: list[Tree] = map_tensors(Tensor.clone, mixers)
        first = next(tensors(self.mixers))
        self.tokens = torch.zeros(len(first), dtype=torch.long, device=first.device)
        self.active = torch.ones_like(self.tokens, dtype=torch.bool)
        with torch.cuda.device(first.device):
            self.graph, self.logits = self._captured(model, now)

    def _captured(self, model: LanguageModel, now: Reading) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        inputs = (model, now, self.tokens, self.mixers, self.active)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their workspaces; what it writes in a cache is never read
            for _ in range(3):
                decode(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits, after = decode(*inputs)
            put(self.mixers, after)
        return graph, logits

    def __call__(self, tokens: Tensor, active: Tensor | None) -> Tensor:
        self.tokens.copy_(tokens)
        self.active.fill_(True) if active is None else self.active.copy_(active)
        self.graph.replay()
        return self.logits.clone()


def put(tree: Tree, new: Tree) -> None:
    """Write the tensors of `new` over those of `tree`. Raises ValueError where their shapes differ."""
    for old, value in zip(tensors(tree), tensors(new), strict=True):
        if old.shape != value.shape:
            raise ValueError(
                f"a mixer's state changed from {tuple(old.shape)} to {tuple(value.shape)} with one token; "
                "a graph needs fixed shapes, decode without it"
            )
        if old is not value:
            old.copy_(value)


def _shapes(tree: Tree) -> list[torch.Size]:
    return [x.shape for x in tensors(tree)]
