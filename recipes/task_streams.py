"""Tasks that come one after the other: permuted and split images, and three texts.

A task gives the loss of its next batch, and scores of a model on its held-out data by reading: accuracy over all
classes, accuracy over the task's own classes, or nats per byte. One seed decides permutations, classes and batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from nestling.data import ByteTokenizer, TokenStream, held_out_windows, load_documents, tokenize
from nestling.evals.protocol import token_losses
from nestling.optim import schedules
from recipes.vision_tasks import CLASSES, Images, batches

TEXTS = {
    "Shakespeare": "shakespeare",  # bundled
    "Wikipedia": "lm/wikitext2_valid.txt.xz",
    "Moby Dick": "moby_dick",  # bundled
}
Matrices = dict[str, list[list[float]]]


class Task(Protocol):
    """What is learned in its turn."""

    def loss(self, model: nn.Module) -> Tensor: ...
    def scores(self, model: nn.Module) -> dict[str, float]: ...


@dataclass(frozen=True)
class ImageTask:
    """Images whose pixels are read in an order of their own; `classes` are the ones that occur."""

    train: Images
    held_out: Images
    rows: Iterator[Tensor]
    classes: Tensor
    pixels: Tensor  # (784,)

    def logits(self, model: nn.Module, images: Images) -> Tensor:
        return model(images.pixels.flatten(1)[:, self.pixels])

    def loss(self, model: nn.Module) -> Tensor:
        batch = self.train.take(next(self.rows))
        return F.cross_entropy(self.logits(model, batch), batch.labels)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Accuracy over all classes, and among the task's own where these are fewer."""
        logits = self.logits(model, self.held_out)
        others = torch.ones(CLASSES, dtype=torch.bool).index_fill(0, self.classes, False)
        made = {"all classes": logits}
        if others.any():
            made["the task's classes"] = logits.masked_fill(others, -torch.inf)
        return {k: (v.argmax(-1) == self.held_out.labels).double().mean().item() for k, v in made.items()}


@dataclass(frozen=True)
class TextTask:
    """A text as rows of bytes that go on from batch to batch, and held-out windows (N, T + 1)."""

    stream: TokenStream
    windows: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        batch = next(self.stream)
        return F.cross_entropy(model(batch.inputs).logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)

    def scores(self, model: nn.Module) -> dict[str, float]:
        logits = model(self.windows[:, :-1]).logits
        return {"nats per byte": token_losses(logits, self.windows[:, 1:]).mean().item()}


def permuted(train: Images, held_out: Images, tasks: int, batch: int, steps: int, seed: int) -> list[Task]:
    """All classes in every task; from the second on the pixels come in a random order."""
    generator, size = Generator().manual_seed(seed), train.pixels[0].numel()
    orders = [torch.arange(size)] + [torch.randperm(size, generator=generator) for _ in range(tasks - 1)]
    every = torch.arange(CLASSES)
    rows = [batches(len(train), batch, steps, seed * tasks + t) for t in range(tasks)]
    return [ImageTask(train, held_out, r, every, order) for r, order in zip(rows, orders, strict=True)]


def split_classes(train: Images, held_out: Images, tasks: int, batch: int, steps: int, seed: int) -> list[Task]:
    """The classes are dealt out to the tasks at random, the same number to each; labels stay those of all classes."""
    made: list[Task] = []
    for t, classes in enumerate(torch.randperm(CLASSES, generator=Generator().manual_seed(seed)).chunk(tasks)):
        own, tested = (x.take(torch.isin(x.labels, classes).nonzero().squeeze(1)) for x in (train, held_out))
        rows = batches(len(own), batch, steps, seed * tasks + t)
        made.append(ImageTask(own, tested, rows, classes, torch.arange(train.pixels[0].numel())))
    return made


def texts(folder: str | None, rows: int, length: int, windows: int, seed: int, part: int) -> list[Task]:
    """The texts in turn. Trained on is the first nine tenths of each; held out is half `part` (0, 1) of the last."""
    made: list[Task] = []
    for name in TEXTS.values():
        text = "".join(load_documents(name, folder)).encode()
        end, half = len(text) * 9 // 10, len(text) // 20
        held_out = text[end + part * half :][:half]
        train, unseen = (tokenize([piece.decode(errors="ignore")], ByteTokenizer()) for piece in (text[:end], held_out))
        stream = TokenStream(train, rows=rows, length=length, seed=seed)
        made.append(TextTask(stream, held_out_windows(unseen, length=length, count=windows)))
    return made


def learn_in_turn(
    model: nn.Module, optimizer: torch.optim.Optimizer, tasks: list[Task], steps: int, warmup: int
) -> Matrices:
    """`steps` on each task at a constant rate after one warm-up; for each reading the scores on every task after each.

    Training stops for good where a loss is no number.
    """
    made: Matrices = {}
    step, sound = 0, True
    for task in tasks:
        for _ in range(steps):
            if not (sound := sound and step_on(task.loss, model, optimizer, schedules.rising(step, warmup))):
                break
            step += 1
        with torch.no_grad():
            after = [other.scores(model) for other in tasks]
        for reading in after[0]:
            made.setdefault(reading, []).append([scores[reading] for scores in after])
    return made


def step_on(
    loss_of: Callable[[nn.Module], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, part: float
) -> bool:
    """One step at this part of the rate; False, and no step, if the loss is no number."""
    optimizer.zero_grad()
    loss = loss_of(model)
    if not loss.isfinite():
        return False
    loss.backward()
    schedules.scale(optimizer, 0, lr=lambda _: part)
    optimizer.step()
    return True
