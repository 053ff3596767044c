"""The methods on a causal language model: the bundled pretrained one, taught by the loss of the next token.

An example is (ids, start): a text (n,), whose tokens from `start` on are to be predicted from those before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from nestling.hf import convert_to_cms
from nestling.hf.llama2c import Llama2cTokenizer, read_model, read_tokenizer
from nestling.hf.own_text import own_text
from nestling.memories.continuum import AdamLike, InnerRule

from .cms import CmsWrites, as_one_stream
from .ewc import ElasticWeights
from .fine_tuning import FineTuning, Method
from .lora import with_lora
from .replay import Reservoir

MODELS = Path(__file__).parents[2] / "tests" / "hf" / "data"
IGNORED = -1

Text = tuple[Tensor, int]


@dataclass(frozen=True)
class Writes:
    """What a row of CMS writes, how often, and how.

    Attributes:
        periods: of the levels, in batches, fast to slow. shares: of the rate, one per level; None = all of it.
        rule: of every level; its rate is not used.
        parts: ends of the names of what is a level; None = the MLPs.
    """

    periods: tuple[int, ...]
    shares: tuple[float, ...] | None = None
    rule: InnerRule = InnerRule(online=True)
    parts: tuple[str, ...] | None = None


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "mlp", "lm_head")
ADAM = InnerRule(direction=AdamLike(), relative=False, bound=math.inf, kappa=3.0)

WRITES = {  # a write is the mean over its period, so that at one rate a slow level moves less per example
    "Hope-1": Writes((1,)),
    "Hope-2": Writes((1, 4)),
    "Hope-3": Writes((1, 4, 16)),
    "one period (2)": Writes((1, 1), (1, 1 / 4)),
    "one period (3)": Writes((1, 1, 1), (1, 1 / 4, 1 / 16)),
    "old text": Writes((1,), rule=InnerRule()),
    "attention too": Writes((1,), rule=InnerRule(), parts=(*ATTENTION, "mlp")),
    "CMS-1": Writes((1,), rule=ADAM, parts=EVERY),
    "CMS-3": Writes((1, 4, 16), (1, 2, 4), ADAM, EVERY),  # a step of Adam is as long after 16 batches as after one
}
TRAINED = {"MLPs": ("mlp",), "every map": EVERY}  # what is fine-tuned, as in "sequential", of the model's linear maps


def pretrained() -> PreTrainedModel:
    """The bundled model of 260,032 parameters."""
    return read_model(MODELS / "stories260K.bin.xz")


@cache
def tokenizer() -> Llama2cTokenizer:
    return read_tokenizer(MODELS / "tok512.bin.xz")


@cache
def own_texts() -> Tensor:
    """(32, 128) sampled by the model itself: what writes spare, and what EWC holds on to before the first task."""
    return own_text(pretrained(), seed=0)


class LanguageTask:
    """A model, and its loss on texts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def token_losses(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Nats (n, T - 1) of the tokens of texts, zero where none is asked for, and which are."""
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in texts], batch_first=True)
        place = torch.arange(1, ids.shape[1])
        bounds = torch.tensor([(start, len(text)) for text, start in texts])
        asked = (place >= bounds[:, :1]) & (place < bounds[:, 1:])
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(~asked, IGNORED)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(asked), asked

    def loss(self, texts: Sequence[Text]) -> Tensor:
        """Mean nats per token that is asked for."""
        losses, asked = self.token_losses(texts)
        return losses.sum() / asked.sum()

    @torch.no_grad()
    def nats(self, texts: Sequence[Text], batch: int = 20) -> tuple[float, int]:
        """Sum of the nats, and number of the tokens that are asked for."""
        total, count = 0.0, 0
        for start in range(0, len(texts), batch):
            losses, asked = self.token_losses(texts[start : start + batch])
            total, count = total + float(losses.sum()), count + int(asked.sum())
        return total, count


def with_levels(model: PreTrainedModel, writes: Writes, rate: float, batch: int) -> None:
    """Put levels into a model, in place, the slow ones into the early layers."""
    shares = (1.0,) * len(writes.periods) if writes.shares is None else writes.shares
    convert_to_cms(
        model,
        [batch * period for period in writes.periods],
        rates=[rate * share for share in shares],
        rule=writes.rule,
        target_modules=writes.parts,
        old_text=own_texts(),
    )
    as_one_stream(model)


def train_only(model: PreTrainedModel, parts: Sequence[str]) -> None:
    """Leave the linear maps in these parts to be trained; an output map gets weights of its own, as a level has."""
    if "lm_head" in parts:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.requires_grad_(False)
    for path, m in model.named_modules():
        if isinstance(m, nn.Linear) and set(parts) & set(path.split(".")):
            m.requires_grad_(True)


def make(
    name: str, value: float, rate: float, *, batch: int, buffer: int, fisher: int, seed: int
) -> tuple[LanguageTask, Method]:
    """The bundled model and what teaches it, by the name in a table. `rate` is Adam's where `value` is no rate."""
    torch.manual_seed(seed)
    model = pretrained()
    if name in WRITES:
        with_levels(model, WRITES[name], value, batch)
        task = LanguageTask(model)
        return task, CmsWrites(model, task.loss, batch=batch)
    if name == "LoRA":
        with_lora(model)
    if name in TRAINED:
        train_only(model, TRAINED[name])
    task = LanguageTask(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": rate if name == "EWC" else value, "batch": batch}
    if name == "EWC":
        weights = ElasticWeights(task.loss, trained, strength=value, examples=fisher)
        weights.consolidate([(ids, 1) for ids in own_texts()])
        options |= {"penalty": weights.penalty, "ended": weights.consolidate}
    if name == "replay":
        options["mixed"] = Reservoir(buffer, seed=seed).mixed
    return task, FineTuning(task.loss, trained, **options)
