"""Why Hope is behind on a task of MAD: one part of it changed at a time, three seeds, read on validation examples.

    python -m recipes.mad_causes                     # after python -m recipes.mad
    python -m recipes.mad_causes --tasks compression --seeds 1
    python -m recipes.mad_causes --table             # the committed result as a table
    python -m recipes.mad_causes --figure            # and as docs/figures/mad_causes.png

Everything else is as in mad.py: equal parameters, steps, rate unless it is what changes. The change with the most right
answers to validation examples, by the mean over seeds, is then compared on the tested examples with every model of the
newest result of mad.py, which had one setting each, and with each baseline at half of that rate; and with the former
on the other tasks, where it chose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nestling.evals.mad import MAD
from nestling.memories.self_modifying import Rule
from recipes import mad
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import newest, parser_of, run
from recipes.recall import HOPE, Parts, minus, shown, shown_difference, table

VALIDATION_SEED = 40_000
BEHIND = ("compression",)
NO_ERASE, TWO_LAYERS = Rule(erase="none", eta_max=1.0), Rule(erase_hidden=True, eta_max=1.0)
CHANGES: dict[str, tuple[Parts, float]] = {  # what Hope is made of, and its rate in units of the table's
    "as in the table": (HOPE, 1),
    "forgets half in 32 tokens": (replace(HOPE, half_life=32.0), 1),
    "does not erase": (replace(HOPE, rule=NO_ERASE), 1),
    "convolution of four tokens": (replace(HOPE, taps=4), 1),
    "convolution of four tokens, SiLU": (replace(HOPE, taps=4, activation=True), 1),
    "queries from a projection": (replace(HOPE, equal=False), 1),
    "memories of two layers": (replace(HOPE, memory="mlp", rule=TWO_LAYERS), 1),
    "half of the rate": (HOPE, 1 / 2),
    "a quarter of the rate": (HOPE, 1 / 4),
    "half of the rate, four tokens": (replace(HOPE, taps=4), 1 / 2),
    "half of the rate, four tokens, SiLU": (replace(HOPE, taps=4, activation=True), 1 / 2),
    "half of the rate, eight tokens": (replace(HOPE, taps=8), 1 / 2),
    "half of the rate, four tokens, does not erase": (replace(HOPE, taps=4, rule=NO_ERASE), 1 / 2),
    "half of the rate, four tokens, two layers": (
        replace(HOPE, taps=4, memory="mlp", rule=TWO_LAYERS),
        1 / 2,
    ),
}
RUNS = Path("runs/mad_causes")


def changed(task: str, change: str, rate: float, seed: int) -> Cell:
    """A changed Hope; `rate` is the table's."""
    parts, factor = CHANGES[change]
    return run_cell(task, "hope", change, rate * factor, seed, parts)


def run_cell(task: str, name: str, change: str, lr: float, seed: int, parts: Parts = HOPE) -> Cell:
    """A model, asked validation and tested examples."""
    asks = {"validation": VALIDATION_SEED, "accuracy": mad.TEST_SEED}
    of = "" if name == "hope" else f"-{name}"
    name_of_cell = f"{task}-{mad.STEPS}{of}-{change.replace(' ', '-')}-{lr:g}-{seed}"
    return cell(RUNS, name_of_cell, lambda: mad.measured(name, MAD[task], lr, seed, asks, parts))


def best_of(cells: dict[str, list[Cell]]) -> str:
    """The change with the highest validation accuracy."""
    return max(cells, key=lambda change: sum(one["validation"] for one in cells[change]))


def against(cells: list[Cell], others: dict[str, list[Cell]]) -> Cell:
    """Tested answers of a changed Hope minus those of each of the others, by seed."""
    return minus([one["accuracy"] for one in cells], mad.accuracies(others))


def report(tasks: Sequence[str], seeds: int) -> Path:
    """Run what is missing, and write the result."""
    models = newest("mad")["metrics"]
    rate = models["rates"]["hope"]

    def cells_of(task: str, change: str) -> list[Cell]:
        return [changed(task, change, rate, seed) for seed in range(seeds)]

    def slower(task: str, name: str) -> list[Cell]:
        lr = models["rates"][name] / 2
        return [run_cell(task, name, "half of the rate", lr, seed) for seed in range(seeds)]

    metrics: Cell = {}
    for task in tasks:
        cells = {change: cells_of(task, change) for change in CHANGES}
        best = best_of(cells)
        others = {other: cells_of(other, best) for other in models["cells"] if other != task}
        differences = {at: against(made, models["cells"][at]) for at, made in ({task: cells[best]} | others).items()}
        control = {name: slower(task, name) for name in models["cells"][task] if name != "hope"}
        metrics[task] = {
            "cells": cells,
            "best": best,
            "elsewhere": others,
            "best minus": differences,
            "baselines at half of their rate": control,
            "best minus these": against(cells[best], control),
        }
    config = {"width": mad.DIM, "steps": mad.STEPS, "tokens of a step": mad.TOKENS, "tested": mad.TESTED}
    return write_result("mad_causes", config, list(range(seeds)), rounded(metrics))


# --- page -------------------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: answers by change, then the best change against each model."""
    lines = []
    for task, found in result["metrics"].items():
        rows = [
            [
                change,
                f"{cells[0]['rate']:g}",
                *(shown([one[key] for one in cells]) for key in ("validation", "accuracy")),
            ]
            for change, cells in found["cells"].items()
        ]
        lines += [table([f"{task}: right answers, %", "rate", "validation", "tested"], rows), ""]
        differences = found["best minus"]
        answers = {at: found["elsewhere"].get(at, found["cells"][found["best"]]) for at in differences}
        rows = [["right answers, %", *(shown([one["accuracy"] for one in cells]) for cells in answers.values())]]
        rows += [
            [f"minus {name}", *(shown_difference(by_name[name]) for by_name in differences.values())]
            for name in differences[task]
        ]
        lines += [table([found["best"], *differences], rows), ""]
        rows = [
            [
                name,
                f"{cells[0]['rate']:g}",
                shown([c["accuracy"] for c in cells]),
                shown_difference(found["best minus these"][name]),
            ]
            for name, cells in found["baselines at half of their rate"].items()
        ]
        lines += [table([f"{task}: half of the rate", "rate", "tested", f"{found['best']}, minus it"], rows), ""]
    return "\n".join([*lines, f"CPU minutes: {cpu_minutes(result['metrics']):.0f}"])


def draw(result: Cell, path: Path) -> None:
    """A panel for each task: the mean over seeds as a bar, every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = result["metrics"]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 + 3.6 * len(panels), 3.6), sharey=True, squeeze=False)
    for panel, (task, found) in zip(axes.flat, panels.items(), strict=True):
        for i, (change, cells) in enumerate(found["cells"].items()):
            values = [100 * one["accuracy"] for one in cells]
            color = "C3" if i == 0 else "C2" if change == found["best"] else "C0"
            panel.barh(i, sum(values) / len(values), color=color, alpha=0.6)
            panel.plot(values, [i] * len(values), "k.", markersize=4)
        panel.set_yticks(range(len(found["cells"])), list(found["cells"]), fontsize=8)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("right answers, %; green: chosen on validation", fontsize=9)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("mad_causes", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=mad.TASKS, default=list(BEHIND))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("mad_causes", options, lambda: report(options.tasks, options.seeds), page, draw)


if __name__ == "__main__":
    main()
