"""MAD: six synthetic tasks that ask for one ability each, at their base settings, in small.

    python -m recipes.mad
    python -m recipes.mad --models hope delta-net --tasks in-context-recall --seeds 1
    python -m recipes.mad --grid --device cuda  # the authors' difficulty grid, for a GPU: never run here
    python -m recipes.mad --table               # the committed result as a table
    python -m recipes.mad --figure              # and as docs/figures/mad.png

Settings, lengths and vocabularies are the authors' (nestling/evals/mad.py), training is not: two blocks of width 32
instead of 128, one head, `STEPS` steps of about `TOKENS` tokens instead of 200 epochs, examples from a pool of the
authors' size. The rate of a model is the one that recipes/mqar.py chose for it, on validation strings of its own; no
example of MAD chose anything. Compression has the authors' decoder: an MLP of two layers that sees the last output and
a position. The models are those of recall.py. A cell of the grid differs from the base in one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestling.evals.mad import MAD, MADTask
from nestling.evals.suite import Examples, score
from nestling.models import LanguageModel, Output, State
from recipes import mqar
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import parser_of, run
from recipes.fitting import fit
from recipes.recall import BASELINES, HOPE, Parts, against, best_rate, loss_on, make, shown, shown_difference, table

DIM, STEPS, TOKENS, TESTED, TEST_SEED = 32, 1_000, 1024, 128, 30_000
MODELS = ("hope", *BASELINES)
TASKS = (
    "in-context-recall",
    "fuzzy-in-context-recall",
    "selective-copying",
    "memorization",
    "compression",
    "noisy-in-context-recall",
)
FEWER: tuple[int, ...] = (6_400, 3_200, 1_600, 800)
SYMBOLS: tuple[int, ...] = (32, 64, 128)
LONGER: tuple[int, ...] = (256, 512, 1_024)
GRID: dict[str, dict[str, tuple[Any, ...]]] = {  # the authors' changes, one at a time
    "in-context-recall": {"vocab_size": SYMBOLS, "length": LONGER, "train_examples": FEWER},
    "fuzzy-in-context-recall": {"vocab_size": SYMBOLS, "length": LONGER, "train_examples": FEWER},
    "selective-copying": {
        "vocab_size": SYMBOLS,
        "length": LONGER[1:],
        "train_examples": FEWER,
        "copied": (32, 64, 96),
    },
    "memorization": {"vocab_size": (512, 1_024, 2_048, 4_096, 8_192)},
    "noisy-in-context-recall": {
        "vocab_size": (48, 80, 144),
        "length": LONGER,
        "train_examples": FEWER,
        "noise": (0.4, 0.6, 0.8),
    },
    "compression": {"vocab_size": SYMBOLS, "length": (64, 128, 256), "train_examples": FEWER},
}
RUNS = Path("runs/mad")


# --- models -----------------------------------------------------------------------------------------------------


class Compressor(nn.Module):
    """A model whose last output is decoded at every position, by one MLP of the model's width."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        dim = model.config.dim
        self.model = model
        self.decoder = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.RMSNorm(dim), nn.Linear(dim, dim), nn.GELU()
        )
        self.norm = nn.RMSNorm(dim)

    def forward(self, tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        hidden, _ = self.model.body(tokens, [None] * len(self.model.blocks))
        places = positions(tokens.shape[1], hidden.shape[-1]).to(hidden)
        decoded = self.decoder(hidden[:, -1:] + places)  # (B, T, D)
        return Output(self.model.to_logits(self.norm(decoded)), state)  # type: ignore[arg-type]


def positions(length: int, dim: int) -> Tensor:
    """(T, D): sines and cosines of falling frequency."""
    rates = 10_000 ** -(torch.arange(dim // 2) / (dim // 2 - 1))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def model_for(name: str, task: MADTask, parts: Parts = HOPE) -> nn.Module:
    """A model, with a decoder where the task wants one."""
    model = make(name, task.vocab_size, DIM, parts)
    return Compressor(model) if task.name == "compression" else model


# --- cells ------------------------------------------------------------------------------------------------------


def rate_of(name: str) -> float:
    """The rate that the sweep of MQAR chose."""
    return best_rate(mqar.sweep(name))


def pool(task: MADTask, rows: int, seed: int) -> Examples:
    """The training examples of a seed, no more than are read."""
    count = min(task.train_examples, rows * STEPS)
    return replace(task, training=True).examples(count, (task.length, task.length), seed)


def measured(
    name: str, task: MADTask, lr: float, seed: int, asks: dict[str, int], parts: Parts = HOPE, device: str = "cpu"
) -> Cell:
    """Train one model on one task; its right answers to the examples of each of the seeds in `asks`, by their names."""
    torch.manual_seed(seed)
    model = model_for(name, task, parts).to(device)
    rows = min(64, max(1, TOKENS // task.length))
    examples = pool(task, rows, seed)

    def loss_at(step: int) -> Tensor:
        part = examples.take(torch.arange(step * rows, (step + 1) * rows) % len(examples))
        return loss_on(model, Examples(part.tokens.to(device), part.targets.to(device)))

    loss = fit(model, loss_at, steps=STEPS, lr=lr)
    lengths = (task.length, task.length)
    found = {key: score(model, task, TESTED, lengths, seed=of, device=device).accuracy for key, of in asks.items()}
    return {"rate": lr, "parameters": sum(p.numel() for p in model.parameters()), "loss": loss} | found


def run_cell(name: str, task: MADTask, lr: float, seed: int, label: str = "base", device: str = "cpu") -> Cell:
    """One model on one task, asked the tested examples."""
    name_of_cell = f"{task.name}-{label}-{STEPS}-{name}-{seed}"
    return cell(RUNS, name_of_cell, lambda: measured(name, task, lr, seed, {"accuracy": TEST_SEED}, device=device))


def grid() -> dict[str, MADTask]:
    """Every setting of the difficulty grid by its label, base settings first."""
    made = {f"{name} base": MAD[name] for name in TASKS}
    for name, changes in GRID.items():
        for field, values in changes.items():
            made |= {f"{name} {field}={value}": replace(MAD[name], **{field: value}) for value in values}
    return made


def run_grid(names: Sequence[str], tasks: Sequence[str], seeds: int, device: str) -> None:
    """The cells of the grid, one by one, into `RUNS`."""
    for label, task in grid().items():
        if task.name in tasks:
            for name in names:
                for seed in range(seeds):
                    run_cell(name, task, rate_of(name), seed, label.split()[1], device)


# --- table ------------------------------------------------------------------------------------------------------


def report(names: Sequence[str], tasks: Sequence[str], seeds: int) -> Path:
    """Run what is missing, and write the result."""
    rates = {name: rate_of(name) for name in names}
    cells = {
        task: {name: [run_cell(name, MAD[task], rates[name], seed) for seed in range(seeds)] for name in names}
        for task in tasks
    }
    metrics: Cell = {"rates": rates, "cells": cells}
    if "hope" in names:
        metrics["hope against"] = {task: against(accuracies(found)) for task, found in cells.items()}
    config = {
        "width": DIM,
        "steps": STEPS,
        "tokens of a step": TOKENS,
        "tested": TESTED,
        "lengths": {task: MAD[task].length for task in tasks},
        "versions": {task: MAD[task].version for task in tasks},
    }
    return write_result("mad", config, list(range(seeds)), rounded(metrics))


def accuracies(found: dict[str, list[Cell]]) -> dict[str, list[float]]:
    """By model, a value for each seed."""
    return {name: [one["accuracy"] for one in cells] for name, cells in found.items()}


def page(result: Cell) -> str:
    """The result as markdown: accuracy by task, then Hope against each other model, then what it took."""
    metrics = result["metrics"]
    tasks = list(metrics["cells"])
    names = list(metrics["rates"])
    values = {task: accuracies(found) for task, found in metrics["cells"].items()}
    rows = []
    for name in names:
        means = [sum(seeds) / len(tasks) for seeds in zip(*(values[task][name] for task in tasks), strict=True)]
        rows.append([name, f"{metrics['rates'][name]:g}", *(shown(values[task][name]) for task in tasks), shown(means)])
    lines = [table(["right answers, %", "rate", *tasks, "mean"], rows)]
    if found := metrics.get("hope against"):
        rows = [[name, *(shown_difference(found[task][name]) for task in tasks)] for name in names if name != "hope"]
        lines += ["", table(["Hope minus, points [95 %]", *tasks], rows)]
    return "\n".join([*lines, "", f"CPU minutes: {cpu_minutes(metrics):.0f}"])


def draw(result: Cell, path: Path) -> None:
    """A panel for each task: the mean over seeds as a bar, every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = result["metrics"]["cells"]
    figure, axes = plt.subplots(
        2, math.ceil(len(cells) / 2), figsize=(11, 5.2), sharex=True, sharey=True, squeeze=False
    )
    for panel, (task, found) in zip(axes.flat, cells.items(), strict=False):
        for i, (name, values) in enumerate(accuracies(found).items()):
            panel.barh(i, 100 * sum(values) / len(values), color="C3" if name == "hope" else "C0", alpha=0.6)
            panel.plot([100 * v for v in values], [i] * len(values), "k.", markersize=4)
        panel.set_yticks(range(len(found)), list(found), fontsize=8)
        panel.set_title(task, fontsize=10)
        panel.set_xlim(0, 102)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("right answers, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("mad", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid", action="store_true", help="run the cells of the difficulty grid, write no result")
    parser.add_argument("--device", default="cpu", help="of the grid (default: cpu)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.grid:
        return run_grid(options.models, options.tasks, options.seeds, options.device)
    run("mad", options, lambda: report(options.models, options.tasks, options.seeds), page, draw)


if __name__ == "__main__":
    main()
