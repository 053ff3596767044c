"""Samba: blocks of Mamba and blocks of attention over a window in turn, each with its MLP (arXiv 2406.07522)."""

from __future__ import annotations

from itertools import cycle

from torch import nn

from ..memories.mamba import Mamba
from .config import ModelConfig, check_frozen
from .lm import LanguageModel
from .transformer import attention_of


class Samba(LanguageModel):
    """Mamba, MLP, attention, MLP, and again; an odd depth ends in Mamba. `periods` must be (inf,)."""

    def __init__(self, config: ModelConfig) -> None:
        check_frozen(config)
        kinds = cycle([mamba_of, attention_of])
        super().__init__(config, lambda config: next(kinds)(config))


def mamba_of(config: ModelConfig) -> nn.Module:
    """The Mamba of one block; `expansion` is its inner width over dim."""
    return Mamba(config.dim, config.chunk_size, expansion=config.expansion)
