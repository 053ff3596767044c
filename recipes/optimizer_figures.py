"""The figures of the optimizer evidence, from the newest result files; the recipes call it with --figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from recipes.command import FIGURES, newest

FLOOR = 45  # per cent; what falls lower leaves its panel
COLOURS = {
    "AdamW": "#1a1a1a",
    "SGD-momentum": "#8a8a8a",
    "Muon": "#2b6cb0",
    "M3": "#c05621",
    "M3, no slow memory": "#ecac78",
    "M3, slower memory": "#7b341e",
    "DeltaMomentum": "#2f855a",
    "DMGD": "#b83280",
    "DGD": "#805ad5",
}


def damage() -> Path:
    """Accuracy against the amount of damage, one panel for each; bars are 95 % intervals over seeds."""
    result = newest("optimizer_damage")
    units = result["config"]["units"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), dpi=80)
    for ax, (kind, unit) in zip(axes.flat, units.items(), strict=False):
        by_amount = {a: v for a, v in result["metrics"]["accuracy"][kind].items() if a != "mean of the damaged"}
        for n, name in enumerate(result["metrics"]["rates"][kind]):
            found = [made[name]["interval"] for made in by_amount.values()]
            where = [i + 0.05 * (n - 3.5) for i in range(len(found))]
            means = [100 * mean for mean, _, _ in found]
            bars = [[100 * (m - low) for m, low, _ in found], [100 * (high - m) for m, _, high in found]]
            ax.errorbar(where, means, bars, color=COLOURS[name], marker=".", lw=1, elinewidth=1, label=name)
        ax.set(title=kind, xlabel=unit, xticks=range(len(by_amount)), xticklabels=list(by_amount))
        ax.set_ylabel("accuracy on clean images, %")
        if ax.get_ylim()[0] < FLOOR - 5:
            ax.set_ylim(bottom=FLOOR)
            ax.set_title(f"{kind} (some fall below {FLOOR} %)")
    legend(axes.flat[-1], axes.flat[0])
    return saved(figure, "optimizer_damage")


def continual() -> Path:
    """What was learned of each task in its turn against what is there at the end, for each stream and reading."""
    metrics = newest("optimizer_continual")["metrics"]
    panels = [
        (f"{where}\n{reading}", found["optimizers"], "texts" in where)
        for where, by_reading in metrics.items()
        for reading, found in by_reading.items()
    ]
    figure, axes = plt.subplots(2, -(-(len(panels) + 1) // 2), figsize=(13, 7), dpi=80)
    for ax, (title, optimizers, loss) in zip(axes.flat, panels, strict=False):
        for name, found in optimizers.items():
            cross(ax, name, found["intervals"]["learned"], found["intervals"]["average"])
        low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
        limits = (ax.get_xlim(), ax.get_ylim())
        ax.plot([low, high], [low, high], ":", color="#999999", lw=1)  # nothing is lost
        ax.set(xlim=limits[0], ylim=limits[1])
        unit = "nats per byte (less is better)" if loss else "accuracy"
        ax.set(xlabel=f"right after its task, {unit}", ylabel="all tasks, at the end")
        ax.set_title(title, fontsize=9)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    legend(axes.flat[-1], axes.flat[0])
    return saved(figure, "optimizer_continual")


def cross(ax: Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    """A point with its intervals, each (mean, low, high)."""
    up, right = ([[v[0] - v[1]], [v[2] - v[0]]] for v in (y, x))
    ax.errorbar(x[0], y[0], up, right, color=COLOURS[name], marker="o", ms=4, lw=1, ls="", label=name)


def legend(ax: Axes, of: Axes) -> None:
    """An empty panel with the names of another one's lines."""
    ax.axis("off")
    ax.legend(*of.get_legend_handles_labels(), loc="center", fontsize=9, frameon=False)


def saved(figure: Any, name: str) -> Path:
    figure.tight_layout()
    path = FIGURES / f"{name}.png"
    figure.savefig(path, metadata={"Software": None})
    return path
