"""The baselines: a Transformer++ whose attention is replaced by another memory of tokens (docs/models.md).

A model here is one line: its memory from a config. Everything else (embedding, norms, gated MLP, head, state, loss,
decoding) is the shell that Hope runs in, so that a comparison compares memories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..memories.hebbian import LinearAttention, Retention
from ..memories.linear import DeltaRule, GatedDeltaRule
from ..memories.titans import TitansMemory
from ..memories.titans_context import MemoryAsContext
from ..memories.titans_hybrids import MemoryAsGate, MemoryAsLayer
from ..memories.ttt import TTTMemory
from .config import ModelConfig, check_frozen
from .lm import LanguageModel


def linear_attention(c: ModelConfig) -> nn.Module:
    """Katharopoulos et al. 2020: adds every key and value to one matrix."""
    return LinearAttention(c.dim, c.heads, c.chunk_size, expansion=c.expansion)


def retnet(c: ModelConfig) -> nn.Module:
    """Sun et al. 2023: the same, with a fixed decay per head."""
    return Retention(c.dim, c.heads, c.chunk_size, expansion=c.expansion)


def delta_net(c: ModelConfig) -> nn.Module:
    """Yang et al. 2024: writes the error, so that a key's old value is replaced."""
    return DeltaRule(c.dim, c.heads, c.chunk_size, expansion=c.expansion)


def gated_delta_net(c: ModelConfig) -> nn.Module:
    """Yang et al. 2025: the same, with a decay chosen by the token."""
    return GatedDeltaRule(c.dim, c.heads, c.chunk_size, expansion=c.expansion)


def ttt_linear(c: ModelConfig) -> nn.Module:
    """Sun et al. 2024: a matrix with a norm, trained on the tokens it reads."""
    return TTTMemory(c.dim, c.heads, c.expansion, c.chunk_size, memory="linear")


def ttt_mlp(c: ModelConfig) -> nn.Module:
    """The same with an MLP of two layers."""
    return TTTMemory(c.dim, c.heads, c.expansion, c.chunk_size)


def titans_lmm(c: ModelConfig) -> nn.Module:
    """Behrouz et al. 2024: an MLP written by its surprise, with momentum and forgetting, and no attention."""
    return TitansMemory(c.dim, c.heads, c.expansion, c.chunk_size)


def titans_mag(c: ModelConfig) -> nn.Module:
    """The same memory as a gate on attention over a window."""
    return MemoryAsGate(c.dim, c.heads, c.expansion, c.chunk_size, window=c.window)


def titans_mal(c: ModelConfig) -> nn.Module:
    """The same memory as a layer before attention over a window."""
    return MemoryAsLayer(c.dim, c.heads, c.expansion, c.chunk_size, window=c.window)


def titans_mac(c: ModelConfig) -> nn.Module:
    """The same memory as context: attention inside a segment, beside what the memory recalls about it."""
    return MemoryAsContext(c.dim, c.heads, c.expansion, c.chunk_size)


MEMORIES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "linear-attention": linear_attention,
    "retnet": retnet,
    "delta-net": delta_net,
    "gated-delta-net": gated_delta_net,
    "ttt-linear": ttt_linear,
    "ttt-mlp": ttt_mlp,
    "titans-lmm": titans_lmm,
    "titans-mac": titans_mac,
    "titans-mag": titans_mag,
    "titans-mal": titans_mal,
}
PUBLISHED: dict[str, dict[str, Any]] = {  # where a paper's sizes differ from the defaults of ModelConfig
    "retnet": {"expansion": 2},
    "gated-delta-net": {"expansion": 2},
    "ttt-linear": {"chunk_size": 16},
    "ttt-mlp": {"chunk_size": 16, "expansion": 4},
    "titans-lmm": {"chunk_size": 16, "expansion": 2},
    "titans-mac": {"expansion": 2},
    "titans-mag": {"chunk_size": 16, "expansion": 2, "window": 256},
    "titans-mal": {"chunk_size": 16, "expansion": 2, "window": 256},
    "samba": {"expansion": 2, "window": 256},
}


class Baseline(LanguageModel):
    """One of MEMORIES and a frozen MLP in each block. `periods` must be (inf,)."""

    def __init__(self, config: ModelConfig) -> None:
        check_frozen(config)
        super().__init__(config, MEMORIES[config.name])
