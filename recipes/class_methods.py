"""What `recipes.class_incremental` compares: its rows, and how each makes a classifier and what teaches it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.memories.continuum import ContinuumLevel, InnerRule
from recipes.class_incremental_page import CONTEXT, FROZEN, MEMORY, TRAINED
from recipes.class_tasks import Example
from recipes.continual_methods.classifier import Classifier
from recipes.continual_methods.cms import CmsWrites, as_one_stream
from recipes.continual_methods.ewc import ElasticWeights
from recipes.continual_methods.fine_tuning import FineTuning, Method
from recipes.continual_methods.memory_head import MemoryHead
from recipes.continual_methods.replay import Reservoir

MODELS = Path(__file__).parents[1] / "tests" / "hf" / "data"
BATCH, BUFFER, FISHER, RIDGE = 10, 200, 30, 1.0
HEAD = InnerRule(relative=False, bound=math.inf, kappa=1.0, online=True)
SHARE = 0.2  # rate of the backbone's levels, of that of the head, where both are written
LEVELS: dict[str, tuple[int, ...]] = {
    "Hope-1": (10,),
    "Hope-2": (10, 40),
    "Hope-3": (10, 40, 160),
    "one period": (10, 10, 10),
}
SLOWDOWN = (1, 1 / 4, 1 / 16)  # rates of "one period", of those of Hope-3: a write is the mean over its period
ALONE = "frozen"  # with a trained head: that of Hope, on a backbone that is never written


@dataclass(frozen=True)
class Row:
    """A line of the table: a method, its head, and the three values that were tried for its one number."""

    method: str
    head: str
    values: tuple[float, ...]


ADAM, ADAM_MEMORY = (3e-4, 1e-3, 3e-3), (1e-6, 1e-5, 1e-4)
WRITE, WRITE_HEAD = (0.005, 0.02, 0.08), (0.03, 0.1, 0.3)
ROWS = (
    Row("Hope-1", TRAINED, WRITE_HEAD),
    Row("Hope-2", TRAINED, WRITE_HEAD),
    Row("Hope-3", TRAINED, WRITE_HEAD),
    Row("one period", TRAINED, WRITE_HEAD),
    Row("frozen", TRAINED, WRITE_HEAD),
    Row("sequential", TRAINED, ADAM),
    Row("LoRA", TRAINED, (1e-3, 3e-3, 1e-2)),
    Row("EWC", TRAINED, (10.0, 100.0, 1000.0)),
    Row("replay", TRAINED, ADAM),
    Row("joint", TRAINED, ADAM),
    Row("Hope-1", MEMORY, WRITE),
    Row("Hope-2", MEMORY, WRITE),
    Row("Hope-3", MEMORY, WRITE),
    Row("frozen", MEMORY, (0.1, 1.0, 10.0)),
    Row("sequential", MEMORY, ADAM_MEMORY),
    Row("LoRA", MEMORY, (1e-5, 1e-4, 1e-3)),
    Row("EWC", MEMORY, (10.0, 100.0, 1000.0)),
    Row("replay", MEMORY, ADAM_MEMORY),
    Row("nearest mean", FROZEN, (0.0,)),
    Row("LDA", FROZEN, (1e-3, 1e-2, 1e-1)),
    Row("KLDA", FROZEN, (0.5, 1.0, 2.0)),
    Row("ICL", CONTEXT, (0.0,)),
    Row("InCA", CONTEXT, (1e-2,)),
)

HEADS = (TRAINED, MEMORY, FROZEN, CONTEXT)
METHODS = tuple(dict.fromkeys(row.method for row in ROWS))


class Storing:
    """The backbone stays as it is; texts go into the memory head."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def learn(self, examples: Sequence[Example]) -> None:
        for start in range(0, len(examples), BATCH):
            self.classifier.store(examples[start : start + BATCH])

    def reading(self) -> AbstractContextManager[Any]:
        return nullcontext()


def pretrained() -> tuple[Any, Any]:
    """The bundled model and its tokenizer."""
    from nestling.hf.llama2c import read_model, read_tokenizer

    return read_model(MODELS / "stories260K.bin.xz"), read_tokenizer(MODELS / "tok512.bin.xz")


def make(row: Row, value: float, rate: float, classes: int, own: Tensor, seed: int) -> tuple[Classifier, Method]:
    """A classifier and what teaches it. `rate` is Adam's where `value` is another number."""
    from nestling.hf import convert_to_cms

    torch.manual_seed(seed)
    model, _ = pretrained()
    if row.method in LEVELS:
        rate = value if row.head == MEMORY else SHARE * value
        rates = [rate * part for part in SLOWDOWN] if row.method == "one period" else rate
        convert_to_cms(model, LEVELS[row.method], rates=rates, rule=InnerRule(online=True), old_text=own)
    elif row.method == "LoRA":
        from recipes.continual_methods.lora import with_lora

        with_lora(model)
    width = model.config.num_hidden_layers * model.config.hidden_size
    ridge = value if row.method == ALONE else RIDGE
    memory = MemoryHead(width, classes, ridge=ridge) if row.head == MEMORY else None
    classifier = Classifier(model, own, classes, memory)
    return classifier, method_of(row, value, rate, classifier, seed)


def method_of(row: Row, value: float, rate: float, classifier: Classifier, seed: int) -> Method:
    """What teaches a classifier."""
    stored = None if classifier.memory is None else classifier.store
    if row.method == ALONE and row.head == MEMORY:
        return Storing(classifier)
    if row.method in LEVELS or row.method == ALONE:
        if classifier.memory is None:
            rule = replace(HEAD, rate=value)
            classifier.head = ContinuumLevel(classifier.head, period=BATCH, rule=rule, name="head")
        as_one_stream(classifier)
        return CmsWrites(classifier, classifier.loss, batch=BATCH, stored=stored)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": rate if row.method == "EWC" else value, "batch": BATCH, "stored": stored}
    if row.method == "EWC":
        weights = ElasticWeights(classifier.loss, trained, strength=value, examples=FISHER)
        options |= {"penalty": weights.penalty, "ended": weights.consolidate}
    if row.method == "replay":
        options["mixed"] = Reservoir(BUFFER, seed=seed).mixed
    return FineTuning(classifier.loss, trained, **options)
