"""Named models, named sizes, and widths trimmed so that two models have the same number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from .baselines import MEMORIES, PUBLISHED, Baseline
from .config import ModelConfig, config_from_dict
from .hope import Hope
from .hope_attention import HopeAttention
from .lm import LanguageModel
from .samba import Samba
from .transformer import Transformer

MODELS: dict[str, Callable[[ModelConfig], LanguageModel]] = {
    "transformer": Transformer,
    "hope": Hope,
    "hope-attention": HopeAttention,
    **dict.fromkeys(MEMORIES, Baseline),
    "samba": Samba,
}
NAMES = tuple(MODELS)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "dim": 128, "depth": 4, "heads": 2},
    "small": {"vocab_size": 8_192, "dim": 320, "depth": 4, "heads": 5},
    "base": {"vocab_size": 32_000, "dim": 768, "depth": 16, "heads": 12, "inner_kappa": 0.0},
    "340m": {"vocab_size": 32_000, "dim": 1_024, "depth": 22, "heads": 16, "inner_kappa": 0.0},
    "760m": {"vocab_size": 32_000, "dim": 1_536, "depth": 24, "heads": 24, "inner_kappa": 0.0},
    "1.3b": {"vocab_size": 32_000, "dim": 2_048, "depth": 23, "heads": 32, "inner_kappa": 0.0},
}
PERIODS = (256, 1_024, math.inf)
DEFAULTS: dict[str, dict[str, Any]] = {  # of single models, over those of their preset
    "hope": {"periods": PERIODS},
    "hope-attention": {"periods": PERIODS},
    **PUBLISHED,
}


def build(name: str, preset: str = "tiny", *, match: int | str | None = None, **overrides: Any) -> LanguageModel:
    """Make a model.

    Args:
        name: one of `NAMES`. preset: one of `PRESETS`. overrides: any field of `ModelConfig`.
        match: trim the hidden widths until the parameters are within 2 % of this number, or of this model at the
            same vocabulary, dim, depth and heads.
    Raises ValueError for unknown names or keys, sizes that cannot be, or a match out of reach.
    """
    config = config_of(name, preset, **overrides)
    if match is not None:
        config = matched(config, match)
    return from_config(config)


def config_of(name: str, preset: str = "tiny", **overrides: Any) -> ModelConfig:
    """The config that `build` uses."""
    for what, value, known in (("model", name, MODELS), ("preset", preset, PRESETS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
    allowed = {f.name for f in fields(ModelConfig)}
    for key in overrides:
        if key not in allowed:
            raise ValueError(f"unknown option {key!r} for model {name!r}; known: {', '.join(sorted(allowed))}")
    return config_from_dict({**PRESETS[preset], **DEFAULTS.get(name, {}), **overrides, "name": name})


def from_config(config: ModelConfig | dict[str, Any]) -> LanguageModel:
    """The model of a config, or of the dict that `dataclasses.asdict` made of one."""
    config = config_from_dict(config) if isinstance(config, dict) else config
    if config.name not in MODELS:
        raise ValueError(f"unknown model {config.name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[config.name](config)


def matched(config: ModelConfig, match: int | str) -> ModelConfig:
    """`config` with the hidden width that brings its parameters nearest to `match`."""
    goal = (
        count(config_of(match, vocab_size=config.vocab_size, dim=config.dim, depth=config.depth, heads=config.heads))
        if isinstance(match, str)
        else match
    )
    least = len(config.periods)
    low, step = count(replace(config, hidden=least)), config.depth * 3 * config.dim
    hidden = least + round((goal - low) / step)
    made = replace(config, hidden=max(hidden, least))
    have = count(made)
    if abs(have - goal) > 0.02 * goal:
        raise ValueError(
            f"match={match}: {config.name} at dim={config.dim}, depth={config.depth} has {have:,} parameters at best, "
            f"not {goal:,}; change dim or depth"
        )
    return made


def count(config: ModelConfig) -> int:
    """Parameters of a config's model, without allocating it."""
    with torch.device("meta"):
        return from_config(config).num_parameters()
