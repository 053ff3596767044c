"""Transformer++: softmax attention with rotary positions and a gated MLP; here, attention plus one frozen level."""

from __future__ import annotations

import math

from torch import nn

from ..memories.attention import Attention
from .config import ModelConfig
from .lm import LanguageModel


class Transformer(LanguageModel):
    """The baseline. `periods` must be (inf,): a Transformer has no level that writes in context."""

    def __init__(self, config: ModelConfig) -> None:
        if config.periods != (math.inf,):
            raise ValueError(
                f"transformer: periods={config.periods} must be (inf,); use hope-attention for finite periods"
            )
        super().__init__(config, attention_of)


def attention_of(config: ModelConfig) -> nn.Module:
    """The attention of one block."""
    return Attention(config.dim, config.heads, window=config.window)
