"""Compiled blocks: the two halves of a block as graphs of torch.compile, each shared by all blocks of one shape.

A graph can ask nothing on the host. What the arithmetic of a half depends on is asked before it is entered: whether
the rows of an attention cache are even, and what the reading says of each map of the channel (`ahead`).
"""

from __future__ import annotations

import os
import shutil
import sys
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
    """`block.read` as graphs, for pieces of one shape while gradients are recorded; other pieces are read as ever.

    Args:
        rows, tokens: of the pieces that are compiled. Every further shape would be a further graph.
        backend: of torch.compile.
    """

    def __init__(self, rows: int, tokens: int, backend: str = "inductor") -> None:
        self.shape = rows, tokens
        autograd_config.donated_buffer = False  # a level's backward pass may be followed by an outer one, of one graph
        self.mix: Callable[..., Any] = torch.compile(_mix, fullgraph=True, backend=backend)
        self.join: Callable[..., Tensor] = torch.compile(_join, fullgraph=True, backend=backend)

    def __call__(self, block: Block, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        if x.shape[:2] != self.shape or not torch.is_grad_enabled():
            return read(block, x, state, lengths)
        if isinstance(block.mixer, Attention) and block.mixer.is_even(state, lengths):
            x, state = self.mix(block, x, _growing(state))
        else:
            y, state = block.mixer(block.norm(x), state, lengths)
            x = x + y
        with block.channel.ahead(*self.shape) as bends:
            return self.join(block.channel, x, bends), state


def _mix(block: Block, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    y, state = block.mixer(block.norm(x), state, None, even=True)
    return x + y, state


def _join(channel: ContinuumStack, x: Tensor, bends: Bends) -> Tensor:
    return channel.join(x, bends)


def _growing(cache: AttentionState | None) -> AttentionState | None:
    """A cache that looks the same to a graph however many places it has."""
    if cache is None:
        return None
    cache = replace(cache, k=cache.k.contiguous(), v=cache.v.contiguous(), slot=cache.slot.contiguous())
    for x in (cache.k, cache.v, cache.slot):
        torch._dynamo.maybe_mark_dynamic(x, 1)
    return cache
