"""All six needle tasks: models of recipes.needles, trained on with every task, read on four times as many tokens.

    python -m recipes.needle_tasks                   # after python -m recipes.needles
    python -m recipes.needle_tasks --table           # the committed result as a table
    python -m recipes.needle_tasks --figure          # and as docs/figures/needle_tasks.png

A model goes on from its weights of recipes.needles, at the rate it had there, for `STEPS` steps: first rows of 384
tokens, then of 1,024, two tasks a step in turn. So UUIDs (S-NIAH-3), several keys, several questions and several values
of one key are learned, in a training of equal tokens for every model. The test book was in no training. A value counts
if every token of it is the likeliest one; RULER's score is the share of such values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from nestling.evals.needles import NEEDLES, needle_score
from nestling.evals.statistics import interval, paired, verdict
from nestling.evals.suite import Examples
from nestling.models import LanguageModel
from recipes import needle_training as training
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import newest, parser_of, run, shown
from recipes.fitting import minimise
from recipes.needles import weights

MODELS = ("hope", "delta-net")
TASKS = tuple(NEEDLES)
STAGES = ((0.4, 384), (1.0, training.LENGTH))  # until this share of the steps: tokens
STEPS = 500
LENGTHS = {1_024: 24, 4_096: 8}  # tokens: examples
TEST_SEED = 13_000
RUNS = Path("runs/needle_tasks")


# --- training ---------------------------------------------------------------------------------------------------


def batch(step: int, seed: int) -> Examples:
    """TOKENS tokens in rows of one length, of two tasks."""
    length = next(length for until, length in STAGES if step < until * STEPS or until == 1)
    rows = training.TOKENS // length
    parts = []
    for i in range(2):
        name, own = TASKS[(2 * step + i) % len(TASKS)], 2 * (seed * 1_000_003 + step) + i + 500_000_000
        parts.append(training.task(name, "train").examples((rows + i) // 2, (length, length), own))
    return Examples(torch.cat([p.tokens for p in parts]), torch.cat([p.targets for p in parts]))


def train(model: LanguageModel, lr: float, seed: int) -> float:
    """Go on with every task; the mean loss of the last steps."""
    generator = torch.Generator().manual_seed(seed)
    return minimise(
        model,
        lambda step: training.loss_on(model, batch(step, seed), generator),
        STEPS,
        training.optimizer_of(model, lr),
        lambda step, _: training.pace(step, STEPS),
    )


def run_cell(name: str, lr: float, seed: int) -> Cell:
    """Train one model on, and read it at every length."""

    def work() -> Cell:
        path = weights(name, lr, seed)
        if not path.is_file():
            raise FileNotFoundError(f"no weights {path}; run python -m recipes.needles --models {name} first")
        torch.manual_seed(seed)
        model = training.make(name)
        model.load_state_dict(torch.load(path))
        made: Cell = {"loss": train(model, lr, seed)}
        for task in TASKS:
            made[task] = {str(length): ask(model, task, length, count) for length, count in LENGTHS.items()}
        return made

    return cell(RUNS, f"{name}-{lr:g}-{seed}", work)


def ask(model: LanguageModel, task: str, length: int, count: int) -> Cell:
    """Shares of right values and of right tokens, and bits per asked token."""
    rows = max(1, 4 * training.LENGTH // length)
    found = needle_score(model, training.task(task, "test"), count, (length, length), seed=TEST_SEED, rows=rows)
    return rounded({"n": count, "values": found.value_share, "tokens": found.accuracy, "bits": found.bits})


# --- result -----------------------------------------------------------------------------------------------------


def report(names: Sequence[str], seeds: int) -> Path:
    """Run what is missing, seed by seed, and write the result."""
    chosen = newest("needles")["metrics"]["chosen rate"]
    cells: dict[str, list[Cell]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            cells[name].append(run_cell(name, chosen[name], seed))
    metrics: Cell = {"rates": {name: chosen[name] for name in names}, "cells": cells}
    if "hope" in names:
        metrics["hope minus"] = {name: against(cells["hope"], cells[name]) for name in names if name != "hope"}
    config = training.config() | {"second stages": STAGES, "second steps": STEPS, "examples by length": LENGTHS}
    config["versions"] = {name: NEEDLES[name].version for name in TASKS}
    return write_result("needle_tasks", config, list(range(seeds)), rounded(metrics))


def against(mine: list[Cell], theirs: list[Cell]) -> Cell:
    """By task and length: interval of the difference in bits, paired by seed."""
    made: Cell = {}
    for task in TASKS:
        made[task] = {}
        for length in map(str, LENGTHS):
            a, b = ([c[task][length]["bits"] for c in cells] for cells in (mine, theirs))
            difference = paired(a, b)
            made[task][length] = asdict(difference) | {"verdict": verdict(difference)}
    return made


# --- page -------------------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: values right in %, then differences in bits."""
    metrics = result["metrics"]
    lengths = [str(length) for length in LENGTHS]
    lines = [f"| values right, %: task | tokens | {' | '.join(metrics['cells'])} |"]
    lines.append("|---" * (2 + len(metrics["cells"])) + "|")
    for task in TASKS:
        for length in lengths:
            means = [
                asdict(interval([100 * c[task][length]["values"] for c in cells]))
                for cells in metrics["cells"].values()
            ]
            lines.append(f"| {task} | {length} | {' | '.join(shown(mean, '.0f') for mean in means)} |")
    for name, found in metrics.get("hope minus", {}).items():
        lines += ["", f"| hope minus {name}, bits per asked token | {' | '.join(lengths)} |"]
        lines.append("|---" * (1 + len(lengths)) + "|")
        for task in TASKS:
            values = [f"{shown(found[task][n], '+.2f')} {found[task][n]['verdict']}" for n in lengths]
            lines.append(f"| {task} | {' | '.join(values)} |")
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.1f} CPU minutes."])


def draw(result: Cell, path: Path) -> None:
    """Values right by length, a panel for each task; the mean of the seeds, and each seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True)
    for panel, task in zip(axes.flat, TASKS, strict=True):
        for i, (name, cells) in enumerate(result["metrics"]["cells"].items()):
            shares = [[100 * c[task][str(length)]["values"] for c in cells] for length in LENGTHS]
            panel.plot(list(LENGTHS), [sum(s) / len(s) for s in shares], color=f"C{i}", label=name)
            for length, found in zip(LENGTHS, shares, strict=True):
                panel.plot([length] * len(found), found, ".", color=f"C{i}", markersize=4, alpha=0.6)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(LENGTHS), [f"{length // 1024}K" for length in LENGTHS])
        panel.set_title(task, fontsize=10)
    axes[0, 0].legend(fontsize=8)
    figure.supylabel("values right, %", fontsize=9)
    figure.supxlabel(f"tokens of text (trained to {training.LENGTH:,})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("needle_tasks", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("needle_tasks", options, lambda: report(options.models, options.seeds), page, draw)


if __name__ == "__main__":
    main()
