"""Hope-Attention: softmax attention and a continuum memory. With one frozen level it is the Transformer."""

from __future__ import annotations

from .config import ModelConfig
from .lm import LanguageModel
from .transformer import attention_of


class HopeAttention(LanguageModel):
    """Attention for what is in context, CMS levels for what is worth keeping."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, attention_of)
