"""A pretrained causal language model some of whose MLPs are continuum levels, as a Hugging Face model of its own type.

It reads as the model it was made from, bit for bit, until it is asked to learn. Its files say what it is: weights and
levels under a model type and a file name of their own, so that nothing loads them as the plain model by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from ..core.level import Levels
from ..memories.continuum import DIRECTIONS, ContinuumLevel, InnerRule
from ..models import State
from .cache import CACHE
from .card import write_card
from .generation import check_cache
from .mlps import bendable
from .modeling import restore_rates
from .pretrained import PretrainedReader, PretrainedShape
from .reading import read_with_state

VARIANT = "nestling"  # weights lie in model.nestling.safetensors
RULE_FIELDS = ("relative", "bound", "erase", "decay", "kappa", "online", "learned", "reset")


class ConvertedConfig(PretrainedConfig):
    """What a converted model is made of.

    Args:
        pretrained: the config of the plain model, as a dictionary.
        modules: paths of the MLPs that are levels. assignment: for each of them, which of the `periods` it has; or a
            list of them, fast to slow, of levels one inside the other.
        periods, rates: of the levels, fast to slow; an infinite period is the string "inf".
        rule: the other fields of `InnerRule`, direction by its name: of all levels, or a list, one per period.
        context: tokens of context at most.
        calibrated: whether the weights bring statistics of old text.
        outer, bptt: how far the outer gradient reaches in training, see `ModelConfig`.
    """

    model_type = "nestling_converted"
    keys_to_ignore_at_inference = ["state", CACHE]

    def __init__(
        self,
        pretrained: dict[str, Any] | None = None,
        modules: Sequence[str] = (),
        assignment: Sequence[int] | Sequence[Sequence[int]] = (),
        periods: Sequence[float | str] = (),
        rates: Sequence[float] = (),
        rule: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        context: int = 0,
        calibrated: bool = False,
        outer: str = "segment",
        bptt: int = 0,
        **more: Any,
    ) -> None:
        self.pretrained = pretrained or {}
        self.modules, self.assignment, self.context = list(modules), list(assignment), context
        self.periods, self.rates, self.rule = list(periods), list(rates), rule or {}
        self.calibrated, self.outer, self.bptt = calibrated, outer, bptt
        super().__init__(**more)

    def pretrained_config(self) -> PretrainedConfig:
        """The config of the plain model."""
        values = dict(self.pretrained)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def rules(self) -> list[InnerRule]:
        """The inner rule of each period."""
        saved = [self.rule] * len(self.rates) if isinstance(self.rule, dict) else self.rule
        return [_rule(rate, **fields) for rate, fields in zip(self.rates, saved, strict=True)]


def _rule(rate: float, *, direction: str, learned: bool, **fields: Any) -> InnerRule:
    return InnerRule(rate=rate, direction=DIRECTIONS[direction], learned=learned and rate > 0, **fields)


class ConvertedForCausalLM(PreTrainedModel, GenerationMixin):
    """The model. `convert_to_cms` makes it; `from_pretrained` loads it.

    Attributes:
        pretrained: the plain model, with levels in the place of MLPs.
        reader: the same as a `ReadingModel`: `reader(tokens, state, learn=True)`, `reader.generate`, `reader.loss`.
    """

    config_class = ConvertedConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: ConvertedConfig, pretrained: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if pretrained is None:
            pretrained = AutoModelForCausalLM.from_config(config.pretrained_config())
        self.pretrained = pretrained
        self.generation_config = pretrained.generation_config
        self._put_levels()
        self.post_init()
        levels = {key: getattr(config, key) for key in ("modules", "assignment", "periods", "rates", "rule")}
        vocabulary = pretrained.get_input_embeddings().num_embeddings
        kind, reach = pretrained.config.model_type, (config.outer, config.bptt)
        shape = PretrainedShape(kind, vocabulary, config.context, levels, *reach)
        object.__setattr__(self, "reader", PretrainedReader(pretrained, shape))  # not a second home of the weights
        self.reader: PretrainedReader

    def init_weights(self) -> None:
        """Nothing: the plain model has initialised itself, or brings its weights."""

    def _put_levels(self) -> None:
        """Wrap the MLPs that the config names."""
        rules, periods = self.config.rules(), [float(period) for period in self.config.periods]
        for path, which in zip(self.config.modules, self.config.assignment, strict=True):
            above, _, name = path.rpartition(".")
            body = bendable(self.pretrained.get_submodule(path))
            device, chosen = next(body.parameters()).device, [which] if isinstance(which, int) else which
            for i in chosen:
                body = level = ContinuumLevel(body, period=periods[i], rule=rules[i], name=f"cms {periods[i]:g}")
            setattr(self.pretrained.get_submodule(above), name, level.to(device))
            if self.config.calibrated and any(math.isfinite(periods[i]) for i in chosen):
                for m in level.maps.values():
                    m.keep_old_keys()
        self._rename_tied()

    def _rename_tied(self) -> None:
        """A map that is a level and shares its weight, as an output map may with the embedding, has a new name."""
        shared = {f"{path}.weight": f"{path}.body.weight" for path in self.config.modules}
        for names in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(self.pretrained, names, None) or {}
            setattr(self.pretrained, names, {shared.get(k, k): shared.get(v, v) for k, v in tied.items()})

    def levels(self) -> Levels:
        """The boxes of this model, fast to slow."""
        return self.reader.levels()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        learn: bool = False,
        state: State | None = None,
        **options: Any,
    ) -> Any:
        """The plain model's forward; with `learn` or a `state`, `reader(input_ids, state, learn)` in its place.

        Args:
            input_ids: (B, T). attention_mask: (B, T), 0 = not read, not counted and not written.
            labels: (B, T), the targets of Hugging Face: position t is predicted from what is before it, -100 = none.
            learn: let the levels write. state: what to read on with; it comes back in the output's `state`.
            options: of the plain model's forward; none of them has a meaning with `learn` or `state`.
        Raises ValueError for options that a reading with state does not know.
        """
        if not learn and state is None:
            return self.pretrained(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        return read_with_state(self.reader, input_ids, attention_mask, labels, learn, state, options)

    def calibrate(self, tokens: Tensor, *, keep: float = 0.9) -> None:
        """Fold text (B, T) of the kind the model was trained on into what its writes go by: old keys, usual lengths."""
        self.reader.calibrate(tokens, keep=keep)
        self.config.calibrated = any(k.endswith("inner_keys") for k in self.state_dict())

    def generate(self, inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
        """`generate` of the plain model; the levels do not write. To go on from what was learned: `nestling.Session`.

        Raises ValueError for a cache without the ids it was made from.
        """
        if options.pop("state", None) is not None:
            raise ValueError(
                "generate: a state is continued by nestling.Session, or model.reader.generate(ids, n, state)"
            )
        check_cache(inputs if inputs is not None else options.get("input_ids"), options)
        return self.pretrained.generate(inputs, *args, **options)

    def prepare_inputs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.pretrained.prepare_inputs_for_generation(*args, **options)

    def get_input_embeddings(self) -> Any:
        return self.pretrained.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.pretrained.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.pretrained.get_output_embeddings()

    def save_pretrained(self, save_directory: Any, *, variant: str | None = VARIANT, **options: Any) -> None:
        """As in transformers, under a file name that the plain model's class does not look for; and a model card."""
        super().save_pretrained(save_directory, variant=variant, **options)
        parameters = sum(p.numel() for p in self.parameters())
        write_card(save_directory, f"{self.pretrained.config.model_type}, converted", self.levels(), parameters)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, variant: str | None = VARIANT, **options: Any) -> Any:
        """As in transformers."""
        made = super().from_pretrained(name, *args, variant=variant, **options)
        restore_rates(made[0] if isinstance(made, tuple) else made)
        return made
