"""convert_to_cms: a pretrained language model's own MLPs become levels, each with a period (paper, section 7.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..memories.continuum import DIRECTIONS, InnerRule, check_periods
from .converted import RULE_FIELDS, ConvertedConfig, ConvertedForCausalLM
from .mlps import check_family, find_mlps, probe
from .own_text import LENGTH, own_text

CONTEXT = 1024  # tokens of context where the model would allow for more: what a reading keeps in memory
RATE, RULE = 0.08, InnerRule(decay=0.03)  # chosen on a novel: recipes/pretrained_reading.py
FAST_RATE, SLOW_RATE, KEPT = 0.64, 0.16, 0.8 ** (1 / 16)  # nested, for each fast period: recipes/slow_levels.py


def convert_to_cms(
    model: PreTrainedModel,
    periods: Sequence[float],
    *,
    assign: str | Sequence[int] = "layers",
    rates: float | Sequence[float] | None = None,
    target_modules: str | Sequence[str] | None = None,
    rule: InnerRule | Sequence[InnerRule] | None = None,
    context: int | None = None,
    old_text: Tensor | None = None,
    calibrate: bool = True,
    outer: str = "segment",
    bptt: int = 0,
) -> ConvertedForCausalLM:
    """Make levels of the MLPs of a pretrained causal language model. Its function is the same until a level writes.

    The model is taken over: its MLPs are wrapped where they are, and its parameters are those of the result.

    Args:
        model: any decoder of transformers whose layers are attention and a dense MLP, parallel or not.
        periods: tokens between two writes, fast to slow; inf = never.
        assign: "layers" = contiguous groups of layers, the slow levels in the early layers; or for every MLP, first
            layer first, the index of its period; or "nested" = every MLP is all levels, one inside the other on its
            weights: in force is W + D_slow + D_fast, so that a fast level's initial state is the slow level's weights.
        rates: one, or one per period, in units of the weights (see `InnerRule`). A write is the mean over its period,
            so at one rate a slow level moves less per token.
        target_modules: which modules are the MLPs, see `find_mlps`; None = by their usual names.
        rule: everything else about a write, one or one per period; its rate is not used. None = each write also takes
            3 % of the earlier ones back, which keeps a long reading from drifting away from what the model knows; with
            "nested" the slowest level takes back 20 % in 16 fast periods, and the others start again from it at a
            document's first token.
        context: tokens of context at most; None = what the model was made for, at most 1,024.
        old_text: ids (B, T) like what the model was trained on, which writes shall spare; None = the model samples
            some itself (32 rows of 128 tokens).
        calibrate: False = no such text is read: writes spare nothing, and a rate, which must then be given, is the
            length of every write.
        outer, bptt: how far the outer gradient of a training step reaches, see `ModelConfig`: first-order, or exact
            through `bptt` writes. A rule with `learned=True` makes every level's rate a parameter of that training.
    Raises ValueError for families that cannot be converted, naming them, and for values that do not fit together.
    """
    check_periods(periods)
    check_family(model)
    if rates is None and not calibrate:
        raise ValueError("rates=None: without old text a rate is the length of every write; give one, e.g. rates=0.001")
    modules = find_mlps(model, target_modules)
    if assign == "nested" and len(periods) > 1 and rates is None:
        rates = nested_rates(periods)
    rules = nested_rules(periods) if assign == "nested" and rule is None else rules_of(rule, len(periods))
    config = ConvertedConfig(
        pretrained=model.config.to_dict(),
        modules=modules,
        assignment=assignment_of(assign, len(modules), len(periods)),
        periods=[period if period != float("inf") else "inf" for period in periods],
        rates=rates_of(rates, len(periods)),
        rule=[as_saved(one) for one in rules],
        context=context_of(context, model.config.get_text_config()),
        outer=outer,
        bptt=bptt,
        dtype=model.dtype,
    )
    probe(model, modules)
    made = ConvertedForCausalLM(config, model).train(model.training)
    if calibrate and any(one.relative or one.kappa for one in rules):
        remember(made, old_text)
    return made


def remember(model: ConvertedForCausalLM, old_text: Tensor | None) -> None:
    """Calibrate with the mean over old text, or over text of the model's own."""
    if old_text is None:
        old_text = own_text(model.pretrained, length=min(LENGTH, model.config.context))
    for i, part in enumerate(old_text.split(8)):
        model.calibrate(part, keep=i / (i + 1))


def nested_rates(periods: Sequence[float]) -> list[float]:
    """Rates of levels inside each other: the slowest keeps its rate per token, whatever its period (inf = never)."""
    ratio = periods[-1] / periods[0] if periods[-1] != float("inf") else 1.0
    return [FAST_RATE] * (len(periods) - 1) + [SLOW_RATE * ratio]


def nested_rules(periods: Sequence[float]) -> list[InnerRule]:
    """Rules of levels inside each other: the slowest forgets slowly, the others start again at a document."""
    if len(periods) == 1:
        return [RULE]
    slowest = InnerRule(decay=1 - KEPT ** (periods[-1] / periods[0]))
    return [InnerRule(reset="document")] * (len(periods) - 1) + [slowest]


def rules_of(rule: InnerRule | Sequence[InnerRule] | None, periods: int) -> list[InnerRule]:
    """One rule per period, fast to slow."""
    if rule is None:
        return [RULE] * periods
    rules = [rule] * periods if isinstance(rule, InnerRule) else list(rule)
    if len(rules) != periods:
        raise ValueError(f"rule: {len(rules)} for {periods} periods; give one, or one per period, fast to slow")
    return rules


def as_saved(rule: InnerRule) -> dict[str, Any]:
    """A rule without its rate, its direction by name."""
    direction = next((name for name, made in DIRECTIONS.items() if made == rule.direction), None)
    if direction is None:
        raise ValueError(f"rule: direction {rule.direction} cannot be saved by name; use one of {list(DIRECTIONS)}")
    return {"direction": direction, **{name: getattr(rule, name) for name in RULE_FIELDS}}


def assignment_of(assign: str | Sequence[int], modules: int, periods: int) -> list[int] | list[list[int]]:
    """For every MLP the index of its period, or the indices of the levels inside each other, fast to slow."""
    if assign == "nested":
        return [list(range(periods)) for _ in range(modules)]
    if assign == "layers":
        if modules < periods:
            raise ValueError(f"periods: {periods} of them, but the model has {modules} MLPs; use at most {modules}")
        return [periods - 1 - i * periods // modules for i in range(modules)]
    if isinstance(assign, str):
        raise ValueError(
            f'assign={assign!r} is unknown; use "layers", "nested", or the index of a period for every MLP'
        )
    chosen = list(assign)
    if len(chosen) != modules or not all(0 <= i < periods for i in chosen):
        raise ValueError(f"assign={chosen}: give {modules} indices, one per MLP, each from 0 to {periods - 1}")
    return chosen


def rates_of(rates: float | Sequence[float] | None, periods: int) -> list[float]:
    """One rate per period, fast to slow."""
    rates = RATE if rates is None else rates
    chosen = [float(rates)] * periods if isinstance(rates, int | float) else [float(rate) for rate in rates]
    if len(chosen) != periods:
        raise ValueError(f"rates={chosen}: {len(chosen)} for {periods} periods; give one, or one per period")
    return chosen


def context_of(context: int | None, config: Any) -> int:
    """Tokens of context at most."""
    limit = getattr(config, "max_position_embeddings", None) or CONTEXT
    if context is None:
        return min(limit, CONTEXT)
    if not 2 <= context <= limit:
        raise ValueError(f"context={context} must lie in 2 .. {limit}, the positions this model has")
    return context
