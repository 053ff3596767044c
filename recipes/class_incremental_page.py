"""The result of recipes.class_incremental as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nestling.evals.continual import mean
from nestling.evals.statistics import interval
from recipes.cells import Cell, cpu_minutes
from recipes.command import shown
from recipes.continual_methods import COLOURS

TRAINED, MEMORY, FROZEN, CONTEXT = "trained head", "memory head", "frozen features", "in context"


def page(result: Cell) -> str:
    """The result as markdown."""
    text, seed, count = result["config"]["chosen on"]
    lines = ["", f"Validation texts of {text}, seed {seed}, {count} texts per class, % at the end, by value tried:", ""]
    for row, tried in result["metrics"]["tried"].items():
        if tried:
            lines.append(f"* {row}: {', '.join(f'{100 * v:.1f} at {value}' for value, v in tried.items())}")
    for name, rows in result["metrics"]["sets"].items():
        gaps = rows["differences"]
        hopes = [row for row in rows if row.startswith("Hope")]
        lines += ["", f"**{name}**, {len(result['seeds'])} seeds, %", ""]
        lines += ["| method | at the end | right after learning | forgetting | best Hope of the same head less this |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for row, made in rows.items():
            if row == "differences":
                continue
            head = row.split(", ")[1]
            best = best_of([hope for hope in hopes if hope.endswith(head)] or hopes, rows)
            gap = "" if row in hopes else shown(gaps[best][row], "+.1f")
            cells = [shown(vars(interval(made[key])), ".1f") if key in made else "" for key in ("final", "learned")]
            lost = shown(vars(interval(made["forgetting"])), ".1f") if "forgetting" in made else ""
            lines.append(f"| {row} | {' | '.join(cells)} | {lost} | {gap} |")
    return "\n".join([*lines[1:], "", f"CPU time: {cpu_minutes(result['metrics']):.0f} minutes (rates not counted)."])


def best_of(names: Sequence[str], rows: Cell) -> str:
    """The row with the highest mean at the end."""
    return max(names, key=lambda name: mean(rows[name]["final"]))


def draw(result: Cell, path: Path) -> None:
    """Average accuracy over the classes so far after each task, mean over seeds, one panel a set and head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets, heads = result["metrics"]["sets"], (TRAINED, MEMORY)
    figure, axes = plt.subplots(2, len(sets), figsize=(3.6 * len(sets) + 2, 6.4), squeeze=False, sharey=True)
    for column, (name, rows) in enumerate(sets.items()):
        for line, head in enumerate(heads):
            panel = axes[line, column]
            for method, colour in COLOURS.items():
                made = rows.get(f"{method}, {head}")
                if made is None:
                    continue
                curves = [[mean(r[: t + 1]) for t, r in enumerate(c["accuracy"])] for c in made["cells"]]
                curve = [100 * mean(points) for points in zip(*curves, strict=True)]
                if method == "joint":
                    panel.axhline(mean(made["final"]), color=colour, linestyle=":", label=method)
                else:
                    panel.plot(range(1, len(curve) + 1), curve, color=colour, marker=".", linewidth=1.2, label=method)
            if (klda := rows.get(f"KLDA, {FROZEN}")) is not None:
                panel.axhline(mean(klda["final"]), color="black", linestyle="--", linewidth=0.8, label="KLDA")
            panel.set_title(f"{name}, {head}", fontsize=10)
            panel.set_ylim(0, 100)
    for panels in axes:
        panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.supylabel("accuracy on all classes so far, %", fontsize=9)
    figure.supxlabel("tasks learned", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
