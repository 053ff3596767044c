"""Low-rank adapters of peft on every linear map of a model; its weights are frozen."""

from __future__ import annotations

from transformers import PreTrainedModel

RANK = 8


def with_lora(model: PreTrainedModel, rank: int = RANK) -> None:
    """Put adapters into a model, in place; of its parameters only theirs are trained. They start as no change."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("with_lora needs the package peft: pip install 'nestling[test]'") from error
    get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0))
