"""Multi-query associative recall (Zoology): accuracy against the number of pairs and against the length.

    python -m recipes.mqar
    python -m recipes.mqar --models hope delta-net --seeds 1
    python -m recipes.mqar --table                # the committed result as a table
    python -m recipes.mqar --figure               # and as docs/figures/mqar.png

Zoology's task in small: a vocabulary of 64 instead of 8,192, strings of 32 tokens with 2, 4, 6 or 8 pairs (its
power-law gaps, rest filled with token 0), fresh ones at every step, a quarter of a batch each; only the values of the
queries are in the loss. Two blocks, one head. Read are other strings: with as many pairs as trained, with more
(up to 30 of 31 possible), and longer ones. Rates: the same three for every model, one seed, by accuracy on validation
strings of the training lengths. The models are those of recall.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nestling.evals.mqar import MQAR
from nestling.evals.suite import Examples, score
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import parser_of, run
from recipes.fitting import fit
from recipes.recall import MODELS, RATES, against, best_rate, loss_on, make, shown, shown_difference, table

VOCABULARY, DIM, LENGTH, PAIRS = 64, 64, 32, (2, 4, 6, 8)
STEPS, BATCH = 300, 32
STRINGS, TEST_SEED, VALIDATION_SEED = 128, 10_000, 20_000
MORE = ((2, 32), (4, 32), (6, 32), (8, 32), (12, 64), (16, 64), (24, 128), (30, 128))  # pairs, tokens
LONGER = ((8, 32), (8, 64), (8, 128), (8, 256))
PARTS = {  # of the table: mean accuracy of some of the points
    "as trained": MORE[:4],
    "more pairs": MORE[4:],
    "longer": LONGER[1:],
}
RUNS = Path("runs/mqar")


# --- cells ------------------------------------------------------------------------------------------------------


def task(pairs: int) -> MQAR:
    """The task of a number of pairs."""
    return MQAR(pairs=pairs, vocab_size=VOCABULARY, random_rest=False)


def batch(seed: int) -> Examples:
    """As many strings of each number of pairs."""
    each = BATCH // len(PAIRS)
    made = [task(pairs).examples(each, (LENGTH, LENGTH), len(PAIRS) * seed + i) for i, pairs in enumerate(PAIRS)]
    return Examples(torch.cat([part.tokens for part in made]), torch.cat([part.targets for part in made]))


def accuracy(model: nn.Module, pairs: int, length: int, seed: int) -> float:
    """Share of right values."""
    return score(model, task(pairs), STRINGS, (length, length), seed=seed).accuracy


def run_cell(name: str, lr: float, seed: int) -> Cell:
    """Train one model and read it."""

    def work() -> Cell:
        torch.manual_seed(seed)
        model = make(name, VOCABULARY, DIM)
        loss = fit(model, lambda step: loss_on(model, batch(seed * 1_000_003 + step)), steps=STEPS, lr=lr)
        validation = [accuracy(model, pairs, LENGTH, VALIDATION_SEED) for pairs in PAIRS]
        return {
            "parameters": model.num_parameters(),
            "loss": loss,
            "validation": sum(validation) / len(validation),
            "read": {f"{p}/{t}": accuracy(model, p, t, TEST_SEED) for p, t in dict.fromkeys(MORE + LONGER)},
        }

    return cell(RUNS, f"{name}-{lr:g}-{seed}", work)


def sweep(name: str) -> dict[str, float]:
    """Validation accuracy of one seed by rate."""
    return {f"{lr:g}": run_cell(name, lr, 0)["validation"] for lr in RATES}


# --- table ------------------------------------------------------------------------------------------------------


def part_of(cells: Sequence[Cell], part: str) -> list[float]:
    """Mean accuracy over the points of a part, by seed."""
    points = [f"{pairs}/{length}" for pairs, length in PARTS[part]]
    return [sum(one["read"][point] for point in points) / len(points) for one in cells]


def compared(cells: dict[str, list[Cell]]) -> Cell:
    """Hope against each other model, by part."""
    return {part: against({name: part_of(found, part) for name, found in cells.items()}) for part in PARTS}


def report(names: Sequence[str], seeds: int) -> Path:
    """Run what is missing, and write the result."""
    swept = {name: sweep(name) for name in names}
    chosen = {name: best_rate(found) for name, found in swept.items()}
    cells = {name: [run_cell(name, lr, seed) for seed in range(seeds)] for name, lr in chosen.items()}
    others = {name: [run_cell(name, lr, 0) for lr in RATES if lr != chosen[name]] for name in names}
    metrics: Cell = {"sweep": swept, "chosen rate": chosen, "cells": cells, "cells of the sweep": others}
    metrics["hope against"] = compared(cells) if "hope" in names else {}
    config = {
        "vocabulary": VOCABULARY,
        "width": DIM,
        "length": LENGTH,
        "pairs": PAIRS,
        "steps": STEPS,
        "batch": BATCH,
        "rates": RATES,
        "strings": STRINGS,
        "version": task(1).version,
    }
    return write_result("mqar", config, list(range(seeds)), rounded(metrics))


def page(result: Cell) -> str:
    """The result as markdown: accuracies by part, then Hope against each other model, then what it took."""
    metrics = result["metrics"]
    rows = [
        [name, f"{metrics['chosen rate'][name]:g}", *(shown(part_of(cells, part)) for part in PARTS)]
        for name, cells in metrics["cells"].items()
    ]
    parts = list(PARTS)
    lines = [table(["right values, %", "rate", *parts], rows)]
    if found := metrics["hope against"]:
        others = list(found[parts[0]])
        rows = [[name, *(shown_difference(found[part][name]) for part in parts)] for name in others]
        lines += ["", table(["Hope minus, points [95 %]", *parts], rows)]
    return "\n".join([*lines, "", f"CPU minutes: {cpu_minutes(metrics):.0f}"])


def draw(result: Cell, path: Path) -> None:
    """Accuracy against pairs, and of eight pairs against tokens: means over seeds, and each seed as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    panels = ((MORE, 0, "pairs (strings as short as fit)", max(PAIRS)), (LONGER, 1, "tokens, 8 pairs", LENGTH))
    for panel, (points, axis, label, trained) in zip(axes, panels, strict=True):
        for i, (name, cells) in enumerate(result["metrics"]["cells"].items()):
            seeds = [[100 * one["read"][f"{p}/{t}"] for p, t in points] for one in cells]
            where, means = [point[axis] for point in points], [sum(v) / len(v) for v in zip(*seeds, strict=True)]
            width = 2.4 if name == "hope" else 1.4
            panel.plot(where, means, color=f"C{i}", linewidth=width, marker=".", label=name)
            for one in seeds:
                panel.plot(where, one, color=f"C{i}", linewidth=0.7, alpha=0.4)
        panel.axvline(trained, color="grey", linestyle=":", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks([point[axis] for point in points], [str(point[axis]) for point in points])
        panel.minorticks_off()
        panel.set_xlabel(f"{label}; dotted: longest trained", fontsize=9)
    axes[0].set_ylabel("right values, %", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 0.85, 1))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("mqar", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("mqar", options, lambda: report(options.models, options.seeds), page, draw)


if __name__ == "__main__":
    main()
