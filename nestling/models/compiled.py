"""Compiled blocks: the two halves of a block as graphs of torch.compile, each shared by all blocks of one shape.

A graph can ask nothing on the host. What the arithmetic of a half depends on is asked before it is entered: whether
the rows of an attention cache are even, and what the reading makes of each map of the channel (`ahead`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as autograd_config

from ..core.state import replace
from ..memories.attention import Attention
from ..memories.attention_cache import AttentionState
from ..memories.continuum import Bends, ContinuumStack
from .block import Block, read
from .lm import LanguageModel


class CompiledRead:
    """What `block.read` computes, through graphs, for pieces of one shape while gradients are recorded; other pieces
    are read as ever. `give` makes it the way that a model's blocks read.

    The first half, norm and mixer, is compiled where the mixer is attention over even rows. Other mixers choose their
    form, and walk through their chunks, on the host. The second half, the channel, is compiled always.
    An exact outer gradient (bptt) cannot pass through: graphs have no second derivative.

    Args:
        rows, tokens: of the pieces that are compiled. Every further shape would be a further graph.
        backend: of torch.compile.
    """

    def __init__(self, rows: int, tokens: int, backend: str = "inductor") -> None:
        self.shape = rows, tokens
        self.mix: Callable[..., tuple[Tensor, AttentionState]] = torch.compile(_mix, backend=backend)
        self.join: Callable[..., Tensor] = torch.compile(_join, backend=backend)
        autograd_config.donated_buffer = False  # levels pass back through a graph, and then parameters once more

    def give(self, model: LanguageModel) -> None:
        """To all blocks of a model, which so have their graphs in common."""
        for block in model.blocks:
            block.reads = self  # type: ignore[assignment]

    def __call__(self, block: Block, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        if x.shape[:2] != self.shape or not torch.is_grad_enabled():
            return read(block, x, state, lengths)
        if isinstance(block.mixer, Attention) and block.mixer.is_even(state, lengths):
            x, state = self.mix(block, x, _of_any_size(state))
        else:
            y, state = block.mixer(block.norm(x), state, lengths)
            x = x + y
        with block.channel.ahead(*self.shape) as bends:
            return self.join(block.channel, x, bends), state


def _mix(block: Block, x: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
    y, state = block.mixer(block.norm(x), state, even=True)
    return x + y, state


def _join(channel: ContinuumStack, x: Tensor, bends: Bends) -> Tensor:
    return channel.join(x, bends)


def _of_any_size(cache: AttentionState | None) -> AttentionState | None:
    """A cache that looks the same to a graph however many places it has."""
    if cache is None:
        return None
    places = {name: getattr(cache, name).contiguous() for name in ("k", "v", "slot")}
    for x in places.values():
        torch._dynamo.maybe_mark_dynamic(x, 1)
    return replace(cache, **places)
