"""Optimizers on real tasks, at equal steps and at equal process time.

    python -m recipes.optimizer_tasks --data DIR       # the cells, and results/optimizer_tasks/<date>-<hardware>.json
    python -m recipes.optimizer_tasks --figure         # docs/figures/optimizer_tasks.png from the newest of these

An MLP and a ViT on Fashion-MNIST, a Transformer and a Hope of equal parameters on Shakespeare (learning_tasks.py); the
optimizers of optimizer_zoo.py; warm-up and cosine to zero over the length of a run; the same fading of matrices for
all. Rates: one seed outside the reporting ones, on validation data, at equal steps: the three of the zoo, and one more
beyond an edge until the best lies inside; then frozen. Equal time: the median process time of a step, measured side by
side, decides how many steps fit into the time of AdamW's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestling.evals.statistics import interval, paired, verdict
from nestling.optim import schedules
from recipes.cells import Cell, cell, rounded, write_result
from recipes.command import newest
from recipes.learning_tasks import TASKS, Folder, Problem
from recipes.optimizer_zoo import FACTOR, FADE, ZOO, Make, fade

CHOOSING = 100  # the seed that rates are chosen with; 0, 1, ... report
WARMUP = 0.05  # of the steps
MOST_RATES = 6
LIBRARY_RATE = 1e-3  # M3's and param_groups' default, at which M3 must be stable
ROUNDS, ROUND = 5, 10  # of the timing: rounds of steps, so that each holds one write of M3's slow memory
RUNS = Path("runs/optimizer_tasks")
FIGURE = Path("docs/figures/optimizer_tasks.png")
SETTINGS = ("equal steps", "equal time")
MEASURES = ("validation loss", "test loss", "test accuracy")
BASELINES = ("AdamW", "Muon")
PAIRS = [(name, other) for other in BASELINES for name in ZOO if name != other]
PAIRS += [("M3", "M3, no slow memory"), ("DeltaMomentum", "SGD-momentum")]


def training(problem: Problem, make: Make, rate: float, steps: int) -> Iterator[tuple[torch.optim.Optimizer, float]]:
    """The optimizer and the training loss of each step."""
    optimizer = make(problem.model, rate)
    schedule = schedules.warmup_cosine(round(WARMUP * steps), steps, final=0.0)
    for step in range(steps):
        schedules.scale(optimizer, step, lr=schedule)
        optimizer.zero_grad()
        loss: Tensor = problem.loss()
        loss.backward()
        optimizer.step()
        fade(problem.model, FADE * schedule(step))
        yield optimizer, loss.item()


def train_cell(task: str, name: str, rate: float, seed: int, steps: int, folder: Folder) -> Cell:
    """One run of an optimizer of the zoo; with a reporting seed it is measured on test data too."""
    parts = ("validation", "test") if seed != CHOOSING else ("validation",)
    path = f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{rate:.3g}-{seed}-{steps}"
    return cell(RUNS, path, lambda: trained(task, ZOO[name].make, rate, seed, steps, folder, parts))


def trained(task: str, make: Make, rate: float, seed: int, steps: int, folder: Folder, parts: Sequence[str]) -> Cell:
    """Train, and measure on parts of the data; losses are None where training diverged."""
    problem = TASKS[task].start(seed, steps, folder)
    losses, kept = [], 0.0
    for optimizer, loss in training(problem, make, rate, steps):
        losses.append(loss)
        if not math.isfinite(loss):
            break
        kept = kept or numbers_kept(optimizer, problem.model)
    finite = math.isfinite(losses[-1])
    made: Cell = {"steps": steps, "rise": rise(losses) if finite else None, "numbers kept per parameter": kept}
    for part in parts:
        found = problem.measure(part) if finite else {"loss": None}
        made |= {f"{part} {what}": value for what, value in found.items()}
    return made | {"training loss": statistics.fmean(losses[-20:]) if finite else None}


def rise(losses: Sequence[float], width: int = 10) -> float:
    """How far the mean training loss of `width` steps ever was above its lowest before: 1 is a steady fall."""
    means = [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]
    lowest, most = means[0], 1.0
    for mean in means:
        lowest = min(lowest, mean)
        most = max(most, mean / lowest)
    return most


def numbers_kept(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> float:
    """Numbers in the state of an optimizer, clocks aside, for each parameter of the model."""
    tensors = [x for x in tree_leaves(optimizer.state_dict()) if isinstance(x, Tensor) and x.dim()]
    return sum(x.numel() for x in tensors) / sum(p.numel() for p in model.parameters())


def sweep(task: str, name: str, folder: Folder) -> dict[float, float]:
    """Validation loss by rate: those of the zoo, and beyond an edge until the best lies inside."""

    def loss(rate: float) -> float:
        found = train_cell(task, name, rate, CHOOSING, TASKS[task].steps, folder)["validation loss"]
        return math.inf if found is None else found

    losses = {rate: loss(rate) for rate in ZOO[name].rates}
    while len(losses) < MOST_RATES:
        best = best_rate(losses)
        if min(losses) < best < max(losses):
            break
        beyond = best / FACTOR if best == min(losses) else best * FACTOR
        losses[beyond] = loss(beyond)
    return dict(sorted(losses.items()))


def best_rate(losses: dict[float, float]) -> float:
    """The rate with the lowest loss."""
    return min(losses, key=losses.__getitem__)


def timing(task: str, folder: Folder) -> Cell:
    """Median process time of a step by optimizer, in milliseconds; rounds of all of them take turns."""

    def work() -> Cell:
        steps = ROUNDS * ROUND
        runs = {
            name: training(TASKS[task].start(CHOOSING, steps, folder), entry.make, entry.rates[0], steps)
            for name, entry in ZOO.items()
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                began = time.process_time()
                for _ in range(ROUND):
                    next(run)
                times[name].append((time.process_time() - began) / ROUND)
        return {name: 1e3 * statistics.median(values) for name, values in times.items()}

    return cell(RUNS, f"{task}-timing", work)


def steps_of(task: str, setting: str, times: Cell) -> dict[str, int]:
    """The steps that each optimizer gets."""
    nominal = TASKS[task].steps
    return {
        name: nominal if setting == "equal steps" else round(nominal * times["AdamW"] / times[name]) for name in ZOO
    }


def reported(task: str, setting: str, rates: dict[str, float], times: Cell, folder: Folder) -> Cell:
    """The runs of the reporting seeds, and every optimizer against the baselines by the decision rule."""
    steps, seeds = steps_of(task, setting, times), range(TASKS[task].seeds)
    runs: dict[str, list[Cell]] = {name: [] for name in ZOO}
    for seed in seeds:
        for name in ZOO:
            runs[name].append(train_cell(task, name, rates[name], seed, steps[name], folder))
    made: Cell = {"steps": steps, "runs": runs, "values": {}, "comparisons": {}}
    for what in (w for w in MEASURES if w in runs["AdamW"][0]):
        values = {name: [run[what] for run in runs[name]] for name in ZOO}
        made["values"][what] = {n: None if None in v else vars(interval(v)) for n, v in values.items()}
        for name, other in PAIRS:
            made["comparisons"][f"{name} - {other}, {what}"] = compared(values[name], values[other], "loss" in what)
    return made


def compared(mine: list[Any], theirs: list[Any], smaller_is_better: bool) -> Cell:
    """The paired difference and what may be said of it."""
    if None in mine or None in theirs:
        return {"verdict": "diverged"}
    difference = paired(mine, theirs)
    return vars(difference) | {"verdict": verdict(difference, smaller_is_better=smaller_is_better)}


def stability(task: str, folder: Folder) -> list[Cell]:
    """M3 at the library's default rate."""
    return [train_cell(task, "M3", LIBRARY_RATE, seed, TASKS[task].steps, folder) for seed in range(TASKS[task].seeds)]


def report(names: Sequence[str], folder: Folder) -> Path:
    """Every cell that is missing, and the result file."""
    metrics: Cell = {"tasks": {}}
    for task in names:
        sweeps = {name: sweep(task, name, folder) for name in ZOO}
        rates, times = {name: best_rate(losses) for name, losses in sweeps.items()}, timing(task, folder)
        made: Cell = {"sweep": {n: {f"{r:.3g}": v for r, v in losses.items()} for n, losses in sweeps.items()}}
        made |= {"rates": rates, "milliseconds per step": times}
        for setting in SETTINGS:
            made[setting] = reported(task, setting, rates, times, folder)
        if task in ("vit", "transformer"):
            made["M3 at the library's rate"] = stability(task, folder)
        metrics["tasks"][task] = made
        say(task, made)
    config = {"choosing seed": CHOOSING, "warm-up": WARMUP, "fade": FADE, "library rate": LIBRARY_RATE}
    return write_result("optimizer_tasks", config, list(range(5)), rounded(metrics))


def say(task: str, made: Cell) -> None:
    """A table on the terminal: validation loss, and the verdicts against AdamW and Muon."""
    for setting in SETTINGS:
        print(f"\n{task}, {setting}", flush=True)
        part = made[setting]
        for name in ZOO:
            values = part["values"]["validation loss"][name]
            verdicts = [part["comparisons"].get(f"{name} - {o}, validation loss", {}).get("verdict") for o in BASELINES]
            mean = f"{values['mean']:.4f}" if values else "diverged"
            print(f"{name:20s} rate {made['rates'][name]:8.4g} {part['steps'][name]:5d} steps {mean:9s} {verdicts}")


def draw() -> Path:
    """Validation loss of every optimizer and task with its interval: equal steps above, equal time below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = newest("optimizer_tasks")["metrics"]["tasks"]
    figure, axes = plt.subplots(2, len(tasks), figsize=(12, 6), dpi=80, sharey=True, sharex="col", squeeze=False)
    for column, (task, made) in enumerate(tasks.items()):
        for row, setting in enumerate(SETTINGS):
            ax, values = axes[row, column], made[setting]["values"]["validation loss"]
            for y, name in enumerate(ZOO):
                v = values[name]
                if v is None:
                    ax.text(0.5, y, "diverged", transform=ax.get_yaxis_transform(), fontsize=8, va="center")
                    continue
                bounds = [[v["mean"] - v["low"]], [v["high"] - v["mean"]]]
                ax.errorbar(v["mean"], y, xerr=bounds, fmt="o", color=f"C{y}", ms=4, capsize=3)
                ax.annotate(
                    str(made[setting]["steps"][name]),
                    (v["mean"], y),
                    (0, 5),
                    fontsize=6,
                    ha="center",
                    textcoords="offset points",
                )
            ax.set_title(f"{task}, {setting}", fontsize=10)
            ax.grid(axis="x", lw=0.4)
        axes[1, column].set_xlabel("validation loss, nats", fontsize=9)
        axes[0, column].set_ylim(len(ZOO) - 0.5, -0.8)
    axes[0, 0].set_yticks(range(len(ZOO)), list(ZOO))
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Software": None})
    return FIGURE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="the folder that holds vision/; else the variable NESTLING_DATA")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--figure", action="store_true", help="only draw the newest result")
    parser.add_argument("--sweep", action="store_true", help="only choose the rates")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.figure:
        print(draw())
    elif options.sweep:
        for task in options.tasks:
            for name in ZOO:
                losses = sweep(task, name, options.data)
                print(task, name, {f"{r:.3g}": round(v, 4) for r, v in losses.items()}, flush=True)
    else:
        print(report([task for task in TASKS if task in options.tasks], options.data))


if __name__ == "__main__":
    main()
