"""Each optimizer against the amount of damage in its data: `python -m recipes.optimizer_damage --data DIR`.

An MLP on 2,000 images of Fashion-MNIST, 300 steps, accuracy on the clean test file. Damaged are the labels, the
gradients (heavy-tailed noise), the order (blocks of one class), the samples (copies), or the classes (half of them
rare). The rate of an optimizer is swept for each kind of damage at its middle amount, with one seed that is not
reported, on a clean fifth of train, and then frozen. `--figure` draws docs/figures/optimizer_damage.png from the newest
file of results/optimizer_damage. About 15 CPU minutes on one thread, in cells under runs/optimizer_damage.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from nestling.evals.statistics import Interval, interval, paired, verdict
from nestling.optim import schedules
from recipes import damages
from recipes.cells import Cell, cell, rounded, write_result
from recipes.optimizer_zoo import LONG_MEMORY
from recipes.sweeps import climb
from recipes.task_streams import step_on
from recipes.vision_tasks import CLASSES, MLP, Images, batches, load, measure, split

RUNS, RESULTS = Path("runs/optimizer_damage"), "optimizer_damage"
SEEDS, SWEEP_SEED = [0, 1, 2, 3, 4], 100
SAMPLES, STEPS, BATCH, WARMUP, COPIES = 2_000, 300, 64, 20, 100
BASELINES, OFF = ("AdamW", "SGD-momentum", "Muon"), "M3, no slow memory"
NOISE, ORDER = "heavy-tailed gradients", "sorted stream"
AMOUNTS: dict[str, tuple[float, ...]] = {
    "none": (0,),
    "wrong labels": (0, 0.2, 0.4, 0.6),
    NOISE: (0, 1, 3, 10),
    ORDER: (0, 16, 64, 256),
    "copies": (0, 0.5, 0.8, 0.95),
    "rare classes": (0, 0.8, 0.9, 0.97),
}
UNITS = {
    "wrong labels": "share of the labels",
    NOISE: "scale of the noise, in RMS of the gradient",
    ORDER: "samples of one class in a row (0: shuffled)",
    "copies": f"share of the set that is copies, {COPIES} of each",
    "rare classes": "share of five classes that is missing",
}


def wrong_labels(images: Images, share: float, generator: Generator) -> Images:
    return replace(images, labels=damages.noisy_labels(images.labels, share, CLASSES, generator))


def copies(images: Images, share: float, generator: Generator) -> Images:
    return images.take(damages.duplicated(len(images), share, COPIES, generator))


def rare_classes(images: Images, share: float, generator: Generator) -> Images:
    rare = torch.randperm(CLASSES, generator=generator)[: CLASSES // 2].tolist()
    return images.take(damages.missing(images.labels, share, rare, generator))


SETS: dict[str, Callable[[Images, float, Generator], Images]] = {
    "wrong labels": wrong_labels,
    "copies": copies,
    "rare classes": rare_classes,
}


def order(images: Images, kind: str, amount: float, seed: int) -> Iterator[Tensor]:
    """The rows of each batch: shuffled epochs, or blocks of one class."""
    if kind == ORDER and amount:
        blocks = damages.in_blocks(images.labels, int(amount), Generator().manual_seed(seed))
        return damages.rebatched(blocks, BATCH)
    return batches(len(images), BATCH, STEPS, seed)


def train(name: str, rate: float, kind: str, amount: float, images: Images, seed: int, steps: int = STEPS) -> MLP:
    """The network after its steps on damaged data, or after the step before its loss stopped to be a number."""
    torch.manual_seed(seed)
    model, generator = MLP(), Generator().manual_seed(seed)
    images = SETS[kind](images, amount, generator) if amount and kind in SETS else images
    optimizer, shape = LONG_MEMORY[name].make(model, rate), schedules.warmup_cosine(WARMUP, STEPS)
    for step, rows in zip(range(steps), order(images, kind, amount, seed), strict=False):
        optimizer.zero_grad()
        loss = loss_on(images.take(rows), model)
        if not loss.isfinite():
            break
        loss.backward()
        if kind == NOISE and amount:
            damages.add_heavy_noise([p.grad for p in model.parameters() if p.grad is not None], amount, generator)
        schedules.scale(optimizer, step, lr=shape)
        optimizer.step()
    return model


class Runs:
    """The cells of a data folder: rates by the clean validation fifth, accuracies on the clean test file."""

    def __init__(self, folder: str | None) -> None:
        self.load = cache(lambda part: load("fashion_mnist", part, folder))
        self.split = cache(lambda seed: split(self.load("train"), seed))

    def accuracy(self, name: str, rate: float, kind: str, amount: float, seed: int) -> float:
        """Of one training run, on validation data for the seed of the sweep, on the test file for the others."""

        def work() -> Cell:
            train_on, validation = self.split(seed)
            model = train(name, rate, kind, amount, train_on.take(torch.arange(SAMPLES)), seed)
            return {"accuracy": measure(model, validation if seed == SWEEP_SEED else self.load("test"))[1]}

        kind = kind if amount else "none"
        key = f"{kind}-{amount:g}-{name}-{rate:.3g}-{seed}".replace(" ", "_").replace(",", "")
        return cell(RUNS, key, work)["accuracy"]

    def sweep(self, name: str, kind: str) -> Cell:
        """The best rate of an optimizer at the middle amount."""
        middle = AMOUNTS[kind][len(AMOUNTS[kind]) // 2]
        rate, found = climb(LONG_MEMORY[name], lambda rate: self.accuracy(name, rate, kind, middle, SWEEP_SEED))
        return {"rate": rate, "accuracy by rate": found}


def loss_on(batch: Images, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch.pixels), batch.labels)


def milliseconds(images: Images, rounds: int = 40) -> dict[str, float]:
    """Median CPU time of a clean step of each optimizer, who take turns in one process."""
    models = {name: MLP() for name in LONG_MEMORY}
    optimizers = {name: LONG_MEMORY[name].make(model, LONG_MEMORY[name].default / 30) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in LONG_MEMORY}
    for rows in batches(len(images), BATCH, rounds, 0):
        batch = images.take(rows)
        for name, model in models.items():
            began = time.process_time()
            step_on(partial(loss_on, batch), model, optimizers[name], 1.0)
            taken[name].append(1000 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def compare(accuracies: dict[str, list[float]]) -> Cell:
    """Each optimizer's interval, and its paired differences to the baselines by the decision rule."""
    made: Cell = {}
    for name, values in accuracies.items():
        made[name] = {"seeds": values, "interval": bounds(interval(values))}
        for other in (*BASELINES, OFF):
            if other != name and (other != OFF or name == "M3"):
                difference = paired(values, accuracies[other])
                word = verdict(difference, smaller_is_better=False)
                made[name][f"minus {other}"] = {"interval": bounds(difference), "verdict": word}
    return made


def bounds(found: Interval) -> list[float | None]:
    return [found.mean, found.low, found.high]


def run(folder: str | None) -> Path:
    """Sweep, then measure; one result file."""
    torch.set_num_threads(1)
    runs = Runs(folder)
    metrics: Cell = {"rates": {}, "accuracy": {}}
    for kind in AMOUNTS:
        metrics["rates"][kind] = {name: runs.sweep(name, kind) for name in LONG_MEMORY}
    for kind, amounts in AMOUNTS.items():
        rate = {name: metrics["rates"][kind][name]["rate"] for name in LONG_MEMORY}
        by_amount = {
            amount: {name: [runs.accuracy(name, rate[name], kind, amount, s) for s in SEEDS] for name in LONG_MEMORY}
            for amount in amounts
        }
        metrics["accuracy"][kind] = {f"{amount:g}": compare(found) for amount, found in by_amount.items()}
        damaged = [found for amount, found in by_amount.items() if amount]
        if damaged:
            means = {
                name: [sum(v) / len(v) for v in zip(*(d[name] for d in damaged), strict=True)] for name in LONG_MEMORY
            }
            metrics["accuracy"][kind]["mean of the damaged"] = compare(means)
    metrics["milliseconds of a step"] = milliseconds(runs.load("test"))
    config = {"samples": SAMPLES, "steps": STEPS, "batch": BATCH, "warm-up": WARMUP, "then": "cosine to a tenth"}
    config |= {"model": "MLP 784-128-128-10", "data": "Fashion-MNIST", "weight decay": 0, "units": UNITS}
    config |= {"seed of the sweep": SWEEP_SEED}
    return write_result(RESULTS, config, SEEDS, rounded(metrics))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets; without it the variable NESTLING_DATA")
    parser.add_argument(
        "--figure", action="store_true", help="draw the figure from the newest result, and train nothing"
    )
    options = parser.parse_args(argv)
    if options.figure:
        from recipes import optimizer_figures

        print(optimizer_figures.damage())
    else:
        print(run(options.data))


if __name__ == "__main__":
    main()
