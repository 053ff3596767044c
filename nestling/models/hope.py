"""Hope: self-modifying Titans and a continuum memory, eqs. (94)-(97). No attention; state of constant size."""

from __future__ import annotations

from torch import nn

from ..memories.self_modifying import GENERATORS, Rule, SelfModifyingTitans
from .config import ModelConfig
from .lm import LanguageModel


class Hope(LanguageModel):
    """A sequence layer that rewrites the memories that generate its own keys, values and rates, and CMS levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, titans_of)


def titans_of(config: ModelConfig) -> nn.Module:
    """The self-modifying Titans of one block."""
    return SelfModifyingTitans(
        config.dim,
        config.heads,
        expansion=config.expansion,
        chunk_size=config.chunk_size,
        rule=Rule() if config.dgd else Rule(erase="none"),
        adaptive_q="q" in config.adaptive,
        frozen=[name for name in GENERATORS if name not in config.adaptive],
        half_life=2048 if config.decay else None,
    )
