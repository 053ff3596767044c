"""The figures of the optimizer evidence, from the newest result files; the recipes call it with --figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS, FIGURES = Path("results"), Path("docs/figures")
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


def newest(recipe: str) -> dict[str, Any]:
    """The newest result of a recipe."""
    return json.loads(max((RESULTS / recipe).glob("*.json")).read_text(encoding="utf-8"))


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
    """For each stream and choice of the rate: the average at the end, what was learned, and forgetting."""
    metrics = newest("optimizer_continual")["metrics"]
    panels = [
        (f"{where}\n{reading}, {choice}", found)
        for where, by_choice in metrics.items()
        for choice, made in by_choice.items()
        for reading, found in made["by reading"].items()
    ]
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(13, 8), dpi=80, squeeze=False)
    for ax, (title, made) in zip(axes.flat, panels, strict=False):
        for n, (name, found) in enumerate(made["optimizers"].items()):
            bars(ax, n / 11 - 0.4, name, found["intervals"])
        ax.set(xticks=range(3), xticklabels=("average at the end", "right after learning", "forgetting"))
        ax.set_title(title, fontsize=9)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_ylabel("nats per byte" if "texts" in title else "accuracy")
    for ax in axes.flat[len(panels) :]:
        legend(ax, axes.flat[0])
    return saved(figure, "optimizer_continual")


def bars(ax: Axes, shift: float, name: str, intervals: dict[str, list[float]]) -> None:
    """One optimizer's three numbers, with their intervals."""
    for i, key in enumerate(("average", "learned", "forgetting")):
        mean, low, high = intervals[key]
        ax.bar(i + shift, mean, width=1 / 11, color=COLOURS[name], label=name if i == 0 else None)
        ax.errorbar(i + shift, mean, [[mean - low], [high - mean]], color="black", lw=0.8)


def legend(ax: Axes, of: Axes) -> None:
    """An empty panel with the names of another one's lines."""
    ax.axis("off")
    ax.legend(*of.get_legend_handles_labels(), loc="center", fontsize=9, frameon=False)


def saved(figure: Any, name: str) -> Path:
    figure.tight_layout()
    path = FIGURES / f"{name}.png"
    figure.savefig(path, metadata={"Software": None})
    return path
