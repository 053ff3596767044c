"""The models of mqar.py and mad.py, of equal parameters, and how Hope is compared with each of them.

`hope` is made of options of the library, one setting for all recall tasks, found on validation examples of MQAR
(docs/log.md): queries come from a memory as keys do (adaptive_q) and that memory starts as the memory of the keys, so
that equal tokens are equal keys from the first step; the convolution is the mean of two tokens without SiLU, so that
the key of a value's token resembles the token before it; memories are matrices; eta starts at 0.54, and nothing
decays at initialisation. `hope-default` is `nestling.models.build("hope")` of the same shape. Levels are frozen in
both: there is no next token here that they could learn from. The others are as their authors published them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.evals.statistics import Interval, interval, paired, verdict
from nestling.evals.suite import NOTHING, Examples
from nestling.memories.projections import ShortConvolution
from nestling.memories.self_modifying import MemoryKind, Rule, SelfModifyingTitans
from nestling.models import LanguageModel, config_of, from_config, matched
from nestling.models.config import ModelConfig
from nestling.models.presets import count
from recipes.cells import Cell

BASELINES = (
    "transformer",
    "linear-attention",
    "retnet",
    "delta-net",
    "gated-delta-net",
    "ttt-linear",
    "ttt-mlp",
    "titans-lmm",
)
MODELS = ("hope", *BASELINES, "hope-default")
RATES = (1e-2, 5e-3, 2e-2)


@dataclass(frozen=True)
class Parts:
    """What `hope` is made of; another recipe changes one of these at a time."""

    memory: MemoryKind = "linear"
    rule: Rule = Rule()
    half_life: float = 1e6  # of the memory that is read, at initialisation, in tokens
    taps: int = 2  # of the convolution, all equal at first
    activation: bool = False  # SiLU behind it
    eta: float = -1.0  # bias of its gate
    equal: bool = True  # queries come from a memory that starts as the keys'


HOPE = Parts()


def hope(config: ModelConfig, parts: Parts = HOPE) -> LanguageModel:
    """Hope for recall, see above."""

    def mixer(config: ModelConfig) -> nn.Module:
        layer = SelfModifyingTitans(
            config.dim,
            config.heads,
            chunk_size=config.chunk_size,
            memory=parts.memory,
            rule=parts.rule,
            adaptive_q=parts.equal,
            half_life=parts.half_life,
            convolution=ShortConvolution(config.dim, width=parts.taps, activation=parts.activation),
        )
        nn.init.constant_(layer.conv.weight, 1 / parts.taps)
        nn.init.constant_(layer.eta_bias, parts.eta)
        if parts.equal:
            q, k = (layer.names.index(name) for name in "qk")
            with torch.no_grad():
                for initial in layer.initial:
                    initial[:, q] = initial[:, k]
        return layer

    return LanguageModel(config, mixer)


def config_for(name: str, vocab_size: int, dim: int, parts: Parts = HOPE) -> ModelConfig:
    """The shape of a model: two blocks, one head, the parameters of the library's Hope, within 2 %."""
    shape: dict[str, Any] = {"vocab_size": vocab_size, "dim": dim, "depth": 2, "heads": 1}
    own = config_of("hope", **shape, periods=(math.inf,), inner_lr=0.0)
    goal = count(own)
    if name == "hope":
        with torch.device("meta"):
            have = hope(own, parts).num_parameters()
        return replace(own, hidden=own.width + round((goal - have) / (3 * dim * own.depth)))
    return own if name == "hope-default" else matched(config_of(name, **shape), goal)


def make(name: str, vocab_size: int, dim: int, parts: Parts = HOPE) -> LanguageModel:
    """A model by its name in the tables; `parts` are those of `hope`."""
    config = config_for(name, vocab_size, dim, parts)
    return hope(config, parts) if name == "hope" else from_config(config)


def loss_on(model: nn.Module, examples: Examples) -> Tensor:
    """Cross-entropy in nats per asked position."""
    logits = model(examples.tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), examples.targets.flatten(), ignore_index=NOTHING)


def best_rate(swept: Mapping[str, float]) -> float:
    """The rate with the highest validation accuracy; among equals the first of `RATES`."""
    return max(RATES, key=lambda lr: swept[f"{lr:g}"])


def against(values: Mapping[str, Sequence[float]]) -> Cell:
    """Hope minus each other model, accuracies of the same seeds: paired interval and verdict."""
    return minus(values["hope"], {name: theirs for name, theirs in values.items() if name != "hope"})


def minus(ours: Sequence[float], others: Mapping[str, Sequence[float]]) -> Cell:
    """Accuracies minus each of the others', of the same seeds."""
    made = {}
    for name, theirs in others.items():
        difference = paired(ours, theirs[: len(ours)])
        made[name] = vars(difference) | {"verdict": verdict(difference, smaller_is_better=False)}
    return made


def shown(values: Sequence[float]) -> str:
    """Accuracies as mean and half of the 95 % interval, in %."""
    found = interval(values)
    half = "" if found.high is None else f" ± {100 * (found.high - found.mean):.1f}"
    return f"{100 * found.mean:.1f}{half}"


def shown_difference(difference: Cell) -> str:
    """Points of Hope over another model, bold where the interval excludes 0."""
    found = Interval(**{key: value for key, value in difference.items() if key != "verdict"})
    bounds = "" if found.low is None or found.high is None else f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    text = f"{100 * found.mean:+.1f}{bounds}"
    return f"**{text}**" if found.excludes_zero else text


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])
