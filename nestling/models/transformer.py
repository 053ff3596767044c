"""Transformer++: softmax attention with rotary positions and a gated MLP; here, attention plus one frozen level."""

from __future__ import annotations

from torch import nn

from ..memories.attention import Attention
from .config import ModelConfig, check_frozen
from .lm import LanguageModel


class Transformer(LanguageModel):
    """The baseline. `periods` must be (inf,): a Transformer has no level that writes in context."""

    def __init__(self, config: ModelConfig) -> None:
        check_frozen(config)
        super().__init__(config, attention_of)


def attention_of(config: ModelConfig) -> nn.Module:
    """The attention of one block."""
    return Attention(config.dim, config.heads, window=config.window)
