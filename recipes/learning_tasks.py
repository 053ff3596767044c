"""The four small learning problems on which optimizers are compared: two on images, two on text.

    problem = TASKS["vit"].start(seed, steps, folder)
    for step in range(steps):
        loss = problem.loss()              # of the next batch; the same ones in the same order for every optimizer
    problem.measure("validation")          # {"loss": nats, "accuracy": ...}; "test" is for the reporting step

Seeds decide the initial weights, the split of the images and the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.data import (
    ByteTokenizer,
    Tokens,
    TokenStream,
    held_out_windows,
    load_documents,
    split_documents,
    tokenize,
)
from nestling.evals.perplexity import window_losses
from nestling.models import LanguageModel, build
from recipes import vision_tasks

Folder = str | Path | None
ROWS, LENGTH = 4, 128  # of a text batch
STREAM = 32  # batches that a row's fast weights live for
PERIODS = (128.0, 512.0, 1024.0)  # of Hope's levels: they write 31, 7 and 3 times in a stream


@dataclass(frozen=True)
class Problem:
    """A model with its data: the loss of the next batch, and measurements on what is held out."""

    model: nn.Module
    loss: Callable[[], Tensor]
    measure: Callable[[str], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A problem to start by seed, the nominal number of steps, and how many seeds report."""

    start: Callable[[int, int, Folder], Problem]
    steps: int
    seeds: int


@lru_cache(maxsize=1)
def fashion(seed: int, folder: Folder) -> tuple[vision_tasks.Images, vision_tasks.Images]:
    """Training and validation images of a seed; kept, because the cells of a seed follow each other."""
    return vision_tasks.split(vision_tasks.load("fashion_mnist", "train", folder), seed)


def images(network: Callable[[], nn.Module], size: int) -> Callable[[int, int, Folder], Problem]:
    """Fashion-MNIST by batches of `size`."""

    def start(seed: int, steps: int, folder: Folder) -> Problem:
        train, validation = fashion(seed, folder)
        torch.manual_seed(seed)
        model = network()
        order = vision_tasks.batches(len(train), size, steps, seed)

        def loss() -> Tensor:
            batch = train.take(next(order))
            return F.cross_entropy(model(batch.pixels), batch.labels)

        def measure(part: str) -> dict[str, float]:
            held_out = vision_tasks.load("fashion_mnist", "test", folder) if part == "test" else validation
            nats, accuracy = vision_tasks.measure(model, held_out)
            return {"loss": nats, "accuracy": accuracy}

        return Problem(model, loss, measure)

    return start


def text(name: str, **options: Any) -> Callable[[int, int, Folder], Problem]:
    """A byte model on Shakespeare, 131K parameters. Of the held-out last tenth the first half is for validation and
    the second for the report."""

    def start(seed: int, steps: int, folder: Folder) -> Problem:
        documents, held_out = split_documents(load_documents("shakespeare"), 0.1)
        half = len(held_out[0]) // 2
        parts = {"validation": held_out[0][:half], "test": held_out[0][half:]}
        torch.manual_seed(seed)
        model = build(name, dim=64, depth=2, heads=2, **options)
        batches = losses(model, TokenStream(tokens(documents), rows=ROWS, length=LENGTH, seed=seed))

        def measure(part: str) -> dict[str, float]:
            windows = held_out_windows(tokens([parts[part]]), length=LENGTH, count=100)
            return {"loss": window_losses(model, windows).mean().item()}

        return Problem(model, lambda: next(batches), measure)

    return start


def tokens(documents: list[str]) -> Tokens:
    """Bytes."""
    return tokenize(documents, ByteTokenizer())


def losses(model: LanguageModel, stream: TokenStream) -> Iterator[Tensor]:
    """The losses of the batches of a stream. Fast weights are carried from batch to batch, contexts are not."""
    state = None
    for i, batch in enumerate(stream):
        state = None if i % STREAM == 0 or state is None else state.reset_context()
        loss, state = model.loss(batch.inputs, batch.targets, state=state)
        state = state.detach()
        yield loss


TASKS = {
    "mlp": Task(images(vision_tasks.MLP, 128), steps=600, seeds=5),
    "vit": Task(images(vision_tasks.ViT, 64), steps=400, seeds=3),
    "transformer": Task(text("transformer"), steps=300, seeds=3),
    "hope": Task(text("hope", match="transformer", periods=PERIODS, inner_kappa=0.0), steps=120, seeds=3),
}
