"""Needles in a haystack: small models trained on rows of at most 1,024 tokens, read on up to 16 times as many.

    python -m recipes.needles
    python -m recipes.needles --models hope gated-delta-net --seeds 1
    python -m recipes.needles --table                # the committed result as a table
    python -m recipes.needles --figure               # and as docs/figures/needles.png

An example counts if every token of its answer is the likeliest one, as greedy decoding would need it; bits say how near
the others were. How the models are trained stands in recipes/needle_training.py. Rates: the same three for every model,
one seed; a model's rate is the one with the fewest bits on validation rows after 160 steps of a training of 480. The
test book was in no training. `hope` has options that the library's (`hope-default`) has not: linear memories, one head,
a convolution without SiLU, other initial gates. Attention is read to four times the training length only, for its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from nestling.evals.needles import needle_score
from nestling.evals.statistics import interval, paired, verdict
from nestling.models import LanguageModel
from recipes import needle_training as training
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import parser_of, run

ATTENTION = ("transformer", "hope-attention")
BASELINES = ("gated-delta-net", "delta-net", "titans-lmm", "retnet", "linear-attention", "ttt-linear")
MODELS = ("hope", *BASELINES, *ATTENTION, "hope-default")
RATES = (1e-2, 5e-3, 2e-2)
SWEEP_STEPS, SWEPT, SWEEP_LENGTH = 160, 480, 96  # the first steps of a training of SWEPT
LENGTHS = {1_024: 64, 2_048: 32, 4_096: 64, 8_192: 16, 16_384: 8}  # tokens: examples
FAR = 4 * training.LENGTH  # where the claim is tested
TEST_SEED, VALIDATION_SEED = 12_000, 20_000
RUNS = Path("runs/needles")


# --- cells ------------------------------------------------------------------------------------------------------


def swept_cell(name: str, lr: float) -> Cell:
    """Bits on validation rows after the first third of a shorter training, at seed 0."""

    def work() -> Cell:
        torch.manual_seed(0)
        model = training.make(name)
        loss = training.train(model, lr, 0, steps=SWEPT, stop=SWEEP_STEPS)
        found = [ask(model, task, "validation", SWEEP_LENGTH, 32, VALIDATION_SEED) for task in training.TRAINED]
        return {"loss": loss, "bits": sum(f["bits"] for f in found) / len(found)}

    return cell(RUNS, f"sweep-{name}-{lr:g}", work)


def run_cell(name: str, lr: float, seed: int) -> Cell:
    """Train one model, keep its weights, and read it at every length."""

    def work() -> Cell:
        torch.manual_seed(seed)
        model = training.make(name)
        made: Cell = {"parameters": model.num_parameters(), "loss": training.train(model, lr, seed)}
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights(name, lr, seed))
        longest = FAR if name in ATTENTION else max(LENGTHS)
        for task in training.TRAINED:
            made[task] = {
                str(length): ask(model, task, "test", length, count, TEST_SEED)
                for length, count in LENGTHS.items()
                if length <= longest
            }
        return made

    return cell(RUNS, f"{name}-{lr:g}-{seed}", work)


def ask(model: LanguageModel, task: str, split: str, length: int, count: int, seed: int) -> Cell:
    """Shares of right answers and right tokens, and bits per asked token, of examples of exactly this length."""
    rows = max(1, 4 * training.LENGTH // length)
    found = needle_score(model, training.task(task, split), count, (length, length), seed=seed, rows=rows)
    return rounded({"n": count, "exact": found.exact_share, "tokens": found.accuracy, "bits": found.bits})


def weights(name: str, lr: float, seed: int) -> Path:
    """Where the weights of a cell lie."""
    return RUNS / f"{name}-{lr:g}-{seed}.pt"


# --- table ------------------------------------------------------------------------------------------------------


def sweep(name: str) -> dict[str, Cell]:
    """The swept cells of a model by rate."""
    return {f"{lr:g}": swept_cell(name, lr) for lr in RATES}


def chosen_rate(swept: dict[str, Cell]) -> float:
    """The rate with the fewest bits; among equals the first."""
    return min(RATES, key=lambda lr: swept[f"{lr:g}"]["bits"])


def compared(cells: dict[str, list[Cell]], task: str, length: int) -> Cell:
    """Interval of `hope`'s share of right answers, and of its bits, minus those of each baseline, paired by seed."""
    made: Cell = {}
    for name in cells:
        if name in BASELINES and "hope" in cells:
            made[name] = {}
            for what in ("exact", "bits"):
                mine, theirs = ([c[task][str(length)][what] for c in cells[n]] for n in ("hope", name))
                both = [pair for pair in zip(mine, theirs, strict=False) if None not in pair]  # None: not finite
                difference = paired([m for m, _ in both], [t for _, t in both])
                made[name][what] = asdict(difference) | {
                    "verdict": verdict(difference, smaller_is_better=what == "bits")
                }
    return made


def report(names: Sequence[str], seeds: int, finished: bool = False) -> Path:
    """Run what is missing, seed by seed, and write the result; `finished`: leave out instead what is missing."""
    swept = {name: sweep(name) for name in names}
    rates = {name: chosen_rate(swept[name]) for name in names}
    cells: dict[str, list[Cell]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            if weights(name, rates[name], seed).with_suffix(".json").is_file() or not finished:
                cells[name].append(run_cell(name, rates[name], seed))
    cells = {name: made for name, made in cells.items() if made}
    hope = {task: compared(cells, task, FAR) for task in training.TRAINED}
    metrics = {"sweep": swept, "chosen rate": rates, "cells": cells, f"hope minus baseline at {FAR}": hope}
    return write_result("needles", config(), list(range(seeds)), rounded(metrics))


def config() -> Cell:
    """What identifies the training and the test."""
    return training.config() | {"rates": RATES, "sweep steps": [SWEEP_STEPS, SWEPT], "examples by length": LENGTHS}


# --- page -------------------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: right answers in %, mean and interval over seeds; then hope against each baseline."""
    metrics, lengths = result["metrics"], [str(length) for length in LENGTHS]
    lines = []
    for task in training.TRAINED:
        lines += ["", f"**{task}**, answers right in %, mean [95 % interval] over seeds", ""]
        lines += [f"| model | seeds | {' | '.join(lengths)} |", "|---" * (2 + len(lengths)) + "|"]
        for name, cells in metrics["cells"].items():
            shown = [share([c[task][length]["exact"] for c in cells if length in c[task]]) for length in lengths]
            lines.append(f"| {name} | {len(cells)} | {' | '.join(shown)} |")
        lines += ["", f"**{task}**, bits per asked token", ""]
        lines += [f"| model | {' | '.join(lengths)} |", "|---" * (1 + len(lengths)) + "|"]
        for name, cells in metrics["cells"].items():
            bits = [[c[task][length]["bits"] for c in cells if length in c[task]] for length in lengths]
            lines.append(f"| {name} | {' | '.join(mean_bits(b) for b in bits)} |")
    for task, found in metrics[f"hope minus baseline at {FAR}"].items():
        lines += ["", f"**hope minus baseline**, {task} at {FAR} tokens", ""]
        lines += ["| baseline | answers right, points | | bits | |", "|---|---|---|---|---|"]
        for name, made in found.items():
            shown = [f"{between(made[what], scale)} | {made[what]['verdict']}" for what, scale in UNITS]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines[1:], "", f"{cpu_minutes(metrics):.1f} CPU minutes."])


def mean_bits(values: Sequence[float | None]) -> str:
    """Their mean; a dash for nothing, and where one is not finite."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known and len(known) == len(values) else "–"


UNITS = (("exact", 100.0), ("bits", 1.0))


def share(values: Sequence[float]) -> str:
    """Percent with its interval; a dash for nothing."""
    return between(asdict(interval(values)), 100.0) if values else "–"


def between(found: Cell, scale: float) -> str:
    """mean [low, high]."""
    mean, low, high = (None if found[k] is None else scale * found[k] for k in ("mean", "low", "high"))
    return f"{mean:.3g}" if low is None or low == high else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def draw(result: Cell, path: Path) -> None:
    """Right answers by length, a panel for each task; the mean of the seeds, and each seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for panel, task in zip(axes, training.TRAINED, strict=True):
        for i, (name, cells) in enumerate(result["metrics"]["cells"].items()):
            lengths = [length for length in LENGTHS if str(length) in cells[0][task]]
            shares = [[100 * c[task][str(length)]["exact"] for c in cells] for length in lengths]
            style = {"color": f"C{i}", "linewidth": 2.4 if name == "hope" else 1.3}
            dashes = "--" if name in ATTENTION or name == "hope-default" else "-"
            panel.plot(lengths, [sum(s) / len(s) for s in shares], dashes, label=name, **style)
            for length, found in zip(lengths, shares, strict=True):
                panel.plot([length] * len(found), found, ".", color=f"C{i}", markersize=4, alpha=0.6)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(LENGTHS), [f"{length // 1024}K" for length in LENGTHS])
        panel.set_title(task.upper(), fontsize=10)
        panel.axvline(training.LENGTH, color="0.8", linewidth=1, zorder=0)
    axes[1].legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes[0].set_ylabel("answers right, %")
    figure.supxlabel(f"tokens of text (trained to {training.LENGTH:,})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("needles", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finished", action="store_true", help="train nothing, report the cells that are there")
    options = parser.parse_args(argv)
    run("needles", options, lambda: report(options.models, options.seeds, options.finished), page, draw)


if __name__ == "__main__":
    main()
