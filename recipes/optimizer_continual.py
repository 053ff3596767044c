"""Tasks in turn, by each optimizer: what is learned, kept and lost: `python -m recipes.optimizer_continual --data DIR`.

Permuted and split MNIST (five tasks, an MLP) and three texts (Shakespeare, Wikipedia, a novel; a small Transformer),
at a constant rate after one warm-up, without anything that guards old tasks: the optimizer alone. The rate is chosen
on a seed and on held-out data that are not reported, by the average over all tasks at the end. `--figure` draws
docs/figures/optimizer_continual.png from the newest file of results/optimizer_continual. About 12 CPU minutes, in
cells under runs/optimizer_continual.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from nestling import optim
from nestling.evals.continual import continual
from nestling.evals.statistics import Interval, interval, paired, verdict
from nestling.models import build
from recipes.cells import Cell, cell, rounded, write_result
from recipes.optimizer_zoo import LONG_MEMORY, Entry
from recipes.sweeps import FIRST, climb
from recipes.task_streams import Task, learn_in_turn, permuted, split_classes, texts
from recipes.vision_tasks import MLP, Images, load, split

RUNS, RESULTS = Path("runs/optimizer_continual"), "optimizer_continual"
SWEEP_SEED, WARMUP, TASKS, BATCH = 100, 20, 5, 64
SLOWER = "M3, slower memory"  # written every 50 steps, kept for 500, and as heavy as the fast one


def m3_slower(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    slow = ((50, 0.9, 1.0),)
    return optim.param_groups(model, lr, matrices=optim.M3, weight_decay=0.0, slow=slow, horizon=None)


ENTRIES = {**LONG_MEMORY, SLOWER: Entry(m3_slower, LONG_MEMORY["M3"].default)}
PAIRS = [(name, other) for name in ENTRIES for other in ("AdamW", "SGD-momentum", "Muon") if name != other]
PAIRS += [("M3", "M3, no slow memory"), (SLOWER, "M3, no slow memory")]
Numbers = tuple[str, str]  # a reading of the scores, and a number of `Continual`


@dataclass(frozen=True)
class Stream:
    """Tasks by seed (and on which held-out data), the model that meets them, and by what the rate is chosen."""

    tasks: Callable[[int, bool], list[Task]]
    model: Callable[[], nn.Module]
    steps: int
    seeds: int
    choices: tuple[Numbers, ...]
    smaller_is_better: bool = False
    powers: tuple[int, ...] = FIRST  # of the rates that a sweep begins with

    def numbers(self, matrices: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
        """The four numbers of each reading."""
        return {k: continual(v, smaller_is_better=self.smaller_is_better).to_dict() for k, v in matrices.items()}

    def goodness(self, value: float) -> float:
        """Larger is better; divergence is worst."""
        return -math.inf if not math.isfinite(value) else -value if self.smaller_is_better else value


def streams(folder: str | None) -> dict[str, Stream]:
    """The three streams, with the data of a folder read when they are needed."""
    loaded = cache(lambda part: load("mnist", part, folder))

    def images(seed: int, sweep: bool) -> tuple[Images, Images]:
        train, validation = split(loaded("train"), seed)
        return train, validation.take(torch.arange(2000)) if sweep else loaded("test")

    def transformer() -> nn.Module:
        return build("transformer", "tiny", dim=64, depth=2, heads=2)

    every, own, text = "all classes", "the task's classes", "nats per byte"
    return {
        "permuted MNIST": Stream(
            lambda seed, sweep: permuted(*images(seed, sweep), TASKS, BATCH, 120, seed),
            MLP, 120, 5, ((every, "average"),),
        ),
        "split MNIST": Stream(
            lambda seed, sweep: split_classes(*images(seed, sweep), TASKS, BATCH, 60, seed),
            MLP, 60, 5, ((every, "average"), (own, "average")), powers=tuple(range(-7, 2)),
        ),
        "three texts": Stream(
            lambda seed, sweep: texts(folder, 8, 64, 64, seed, 0 if sweep else 1),
            transformer, 60, 3, ((text, "average"),), smaller_is_better=True, powers=(-1, 0, 1),
        ),
    }  # fmt: skip


def matrices(where: str, stream: Stream, name: str, rate: float, seed: int) -> dict[str, list[list[float]]]:
    """The scores after each task, by reading; on validation data for the seed of the sweep."""

    def work() -> Cell:
        torch.manual_seed(seed)
        model = stream.model()
        tasks = stream.tasks(seed, seed == SWEEP_SEED)
        return {"scores": learn_in_turn(model, ENTRIES[name].make(model, rate), tasks, stream.steps, WARMUP)}

    key = f"{where}-{name}-{rate:.3g}-{seed}".replace(" ", "_").replace(",", "")
    return cell(RUNS, key, work)["scores"]


def chosen(where: str, stream: Stream, name: str, by: Numbers) -> Cell:
    """The rate of an optimizer that is best by a number on the seed of the sweep, and what it gave by rate."""
    reading, number = by
    seen: Cell = {}

    def goodness(rate: float) -> float:
        found = stream.numbers(matrices(where, stream, name, rate, SWEEP_SEED))
        seen[f"{rate:.3g}"] = {k: {n: v[n] for n in ("average", "learned")} for k, v in found.items()}
        return stream.goodness(found[reading][number])

    return {"rate": climb(ENTRIES[name], goodness, stream.powers)[0], "by rate": seen}


def measured(where: str, stream: Stream, rates: dict[str, float], reading: str) -> Cell:
    """Each optimizer at its rate: mean matrix, four numbers with intervals, and paired differences."""
    runs = {n: [matrices(where, stream, n, rates[n], s) for s in range(stream.seeds)] for n in ENTRIES}
    numbers = {n: [stream.numbers(scores)[reading] for scores in seeds] for n, seeds in runs.items()}
    optimizers: Cell = {}
    for name, seeds in runs.items():
        mean = torch.tensor([scores[reading] for scores in seeds], dtype=torch.float64).mean(0).tolist()
        values = {key: [v[key] for v in numbers[name]] for key in numbers[name][0]}
        optimizers[name] = {"rate": rates[name], "matrix": mean, "seeds": values}
        optimizers[name]["intervals"] = {key: bounds(interval(v)) for key, v in values.items()}
    return {"optimizers": optimizers, "differences": differences(stream, numbers)}


def differences(stream: Stream, numbers: dict[str, list[dict[str, float]]]) -> Cell:
    """The decision rule for each pair, on the average, what was learned, and forgetting."""
    made: Cell = {}
    for name, other in PAIRS:
        made[f"{name} minus {other}"] = found = {}
        for key in ("average", "learned", "forgetting"):
            difference = paired([v[key] for v in numbers[name]], [v[key] for v in numbers[other]])
            smaller = stream.smaller_is_better or key == "forgetting"
            found[key] = {"interval": bounds(difference), "verdict": verdict(difference, smaller_is_better=smaller)}
    return made


def bounds(found: Interval) -> list[float | None]:
    return [found.mean, found.low, found.high]


def run(folder: str | None, names: Sequence[str]) -> Path:
    """These streams, one result file."""
    torch.set_num_threads(1)
    metrics: Cell = {}
    every = {name: stream for name, stream in streams(folder).items() if name in names}
    for where, stream in every.items():
        metrics[where] = {}
        for reading, number in stream.choices:
            sweep = {name: chosen(where, stream, name, (reading, number)) for name in ENTRIES}
            rates = {name: found["rate"] for name, found in sweep.items()}
            metrics[where][reading] = {
                "rate chosen by": number,
                "sweep": sweep,
                **measured(where, stream, rates, reading),
            }
    config = {"batch": BATCH, "warm-up": WARMUP, "then": "constant", "weight decay": 0, "seed of the sweep": SWEEP_SEED}
    config |= {
        "MNIST": "MLP 784-128-128-10, five tasks",
        "texts": "Transformer, width 64, depth 2, 8 x 64 bytes a step",
    }
    config |= {"steps of a task": {where: stream.steps for where, stream in every.items()}}
    return write_result(RESULTS, config, list(range(max(s.seeds for s in every.values()))), rounded(metrics))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets; without it the variable NESTLING_DATA")
    parser.add_argument("--figure", action="store_true", help="draw the figure from the newest result, train nothing")
    names = list(streams(None))
    parser.add_argument("--streams", nargs="+", choices=names, default=names, help="which; the default is all")
    options = parser.parse_args(argv)
    if options.figure:
        from recipes import optimizer_figures

        print(optimizer_figures.continual())
    else:
        print(run(options.data, options.streams))


if __name__ == "__main__":
    main()
