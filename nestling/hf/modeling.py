"""The models of this library as Hugging Face models: NestlingConfig and NestlingForCausalLM."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from ..core.level import Levels
from ..memories.continuum import ContinuumLevel
from ..models import LanguageModel, ModelConfig, State, from_config
from ..models.config import config_from_dict
from .cache import CACHE, NestlingCache
from .card import write_card
from .generation import check_cache
from .reading import ReadingOutput, read_with_state


class NestlingConfig(PretrainedConfig):
    """The config of a model of this library: `NestlingConfig(name="hope", vocab_size=256, dim=64, depth=2, heads=2)`.

    Args:
        model: the fields of `ModelConfig` as a dictionary; None = they are among the other arguments.
    """

    model_type = "nestling"
    keys_to_ignore_at_inference = ["state", CACHE]

    def __init__(self, model: dict[str, Any] | None = None, **more: Any) -> None:
        if model is None:
            model = {"name": "hope"} | {key: more.pop(key) for key in _FIELDS if key in more}
        periods = model.get("periods", ModelConfig.periods)
        self.model = model | {"periods": ["inf" if period == math.inf else period for period in periods]}  # for JSON
        for ours, theirs in _SAME.items():
            more.pop(theirs, None)
            setattr(self, theirs, self.model.get(ours, getattr(ModelConfig, ours)))
        super().__init__(**more)

    @classmethod
    def of(cls, config: ModelConfig, **more: Any) -> NestlingConfig:
        """The config of a model built by `nestling.models.build`: `NestlingConfig.of(model.config)`."""
        return cls(model=asdict(config), **more)

    def model_config(self) -> ModelConfig:
        """The same as a `ModelConfig`. Raises ValueError for what cannot be a model."""
        periods = [math.inf if period == "inf" else period for period in self.model["periods"]]
        return config_from_dict(self.model | {"periods": periods})


_FIELDS = [field.name for field in fields(ModelConfig)]
_SAME = {"vocab_size": "vocab_size", "dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}


class NestlingForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of this library for `generate`, `Trainer`, `save_pretrained` and `from_pretrained`.

    Attributes:
        reader: the model itself, a `LanguageModel`.
    """

    config_class = NestlingConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: NestlingConfig, reader: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.reader: LanguageModel = from_config(config.model_config()) if reader is None else reader
        self.post_init()

    @classmethod
    def of(cls, model: Any) -> NestlingForCausalLM:
        """A `LanguageModel` in the clothes of transformers; the weights are the same tensors."""
        return cls(NestlingConfig.of(model.config, dtype=model.dtype), model).train(model.training)

    def init_weights(self) -> None:
        """Nothing: a model of this library has initialised itself."""

    def levels(self) -> Levels:
        """The boxes of the model, fast to slow."""
        return self.reader.levels()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        learn: bool = False,
        state: State | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> ReadingOutput:
        """Read ids (B, T).

        Args:
            attention_mask: (B, T), or longer if a cache was given: 0 = not read, not counted and not written.
            labels: (B, T), the targets of Hugging Face: position t is predicted from what is before it, -100 = none.
            learn: let the levels write. state: what to read on with; it comes back in the output's `state`.
            use_cache: give the state back as a cache too; a cache given is read on with, and changed.
            logits_to_keep: logits of so many last positions; 0 = all.
        Raises ValueError for options that have no meaning here, or a cache and a state at once.
        """
        cache = options.pop(CACHE, None)
        if cache is not None and state is not None:
            raise ValueError("forward: a cache and a state were given; give one of them")
        if isinstance(cache, NestlingCache):
            state = cache.state
        elif cache is not None:
            raise ValueError(f"forward: the cache is a {type(cache).__name__}; give a NestlingCache, or none")
        mask = None if attention_mask is None or input_ids is None else attention_mask[:, -input_ids.shape[1] :]
        out = read_with_state(self.reader, input_ids, mask, labels, learn, state, options)
        if input_ids is not None and (use_cache or cache is not None):
            cache = NestlingCache() if cache is None else cache
            cache.state, cache.columns = out.state, cache.columns + input_ids.shape[1]
            out[CACHE] = cache
        if logits_to_keep and out.logits is not None:
            out["logits"] = out.logits[:, -logits_to_keep:]
        return out

    def generate(self, inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
        """As in transformers, with a `NestlingCache`. To go on with a memory: `nestling.Session`.

        Raises ValueError for a cache without the ids it was made from.
        """
        if options.get("state") is not None:
            raise ValueError(
                "generate: a state is continued by nestling.Session, or model.reader.generate(ids, n, state)"
            )
        check_cache(inputs if inputs is not None else options.get("input_ids"), options)
        return super().generate(inputs, *args, **options)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any, **more: Any) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = NestlingCache()

    def _update_model_kwargs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Only the cache is handed on: transformers before 5.24 takes an output named `state` for one as well."""
        kept = super()._update_model_kwargs_for_generation(*args, **options)
        kept.pop("state", None)
        return kept

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> Any:
        return self.reader.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.reader.embedding = value

    def get_output_embeddings(self) -> Any:
        return self.reader.head

    def set_output_embeddings(self, value: Any) -> None:
        self.reader.head = value

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As in transformers, with a model card that lists the levels."""
        super().save_pretrained(save_directory, **options)
        write_card(save_directory, self.config.model["name"], self.levels(), self.reader.num_parameters())

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **options: Any) -> Any:
        """As in transformers."""
        made = super().from_pretrained(name, *args, **options)
        restore_rates(made[0] if isinstance(made, tuple) else made)
        return made


def restore_rates(model: nn.Module) -> None:
    """Rates that are not learned are in no file: take them from the rules, after weights were loaded."""
    for level in model.modules():
        if isinstance(level, ContinuumLevel) and not level.rule.learned:
            rate = level.rule.rate
            log_rate = math.log(rate) if rate > 0 else -math.inf
            level.register_buffer(
                "inner_log_rate", torch.tensor(log_rate, device=level.inner_unit.device), persistent=False
            )
