"""Draw the figures of the evidence from the committed result files: `python -m recipes.figures`."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from recipes.command import FIGURES, newest

COLOURS = {"transformer": "#7a7a7a", "hope-attention": "#2b6cb0", "hope": "#c05621"}
READINGS = {"limit 1 %": "#9ac1e6", "limit 0.5 %": "#2b6cb0", "default": "#7a7a7a"}
LINES = {0: "-", 1: "--", 2: ":"}


def by_position(axes: Axes, recipe: str) -> None:
    """Validation loss by position, each seed a line; the Transformer full and windowed."""
    for name, cells in newest(recipe)["metrics"]["models"].items():
        for i, cell in enumerate(cells):
            kinds = ("long full", "long window") if name == "transformer" else ("long",)
            for kind in kinds:
                values = cell[f"{kind} by position"]
                width = 1024 / len(values)
                label = {"long": name, "long full": "Transformer++, full", "long window": "Transformer++, window 256"}
                axes.plot(
                    [(j + 0.5) * width for j in range(len(values))],
                    values,
                    color=COLOURS[name],
                    linestyle=":" if kind == "long full" else "-",
                    label=label[kind] if i == 0 else None,
                    linewidth=1.2,
                )
    axes.axvline(256, color="black", linewidth=0.6)
    axes.set(xlabel="position in the window (trained to 256)", ylabel="validation loss, nats per byte")
    axes.set_title(recipe.replace("_", " ") + " steps", fontsize=10)
    axes.legend(fontsize=8)


def frontier(axes: Axes, name: str) -> None:
    """Gain against forgetting of one reader for the three settings of periods, each seed a line."""
    curves = newest("it_keeps_learning_1250")["metrics"]["readers"][name]["curves"]
    for style, (setting, seeds) in enumerate(curves.items()):
        for i, curve in enumerate(seeds):
            points = [(0.0, 0.0), *((p["forgetting"], p["gain"]) for p in curve["points"])]
            axes.plot(
                *zip(*points, strict=True),
                LINES[style],
                color=f"C{style}",
                marker=".",
                label=setting if i == 0 else None,
                linewidth=1.2,
            )
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set(xlabel="forgetting on Shakespeare, %", ylabel="gain on Emma, second half, %", xlim=(-1, 4))
    axes.set_title(f"{name}: gain against forgetting", fontsize=10)
    axes.legend(fontsize=8)


def novels(axes: Axes) -> None:
    """Each fresh novel by setting: the gain, a dot per model."""
    metrics = newest("fresh_novels")["metrics"]
    order = sorted(metrics["strange bytes"], key=lambda n: metrics["limit 0.5 %"]["novels"][n]["gain"]["mean"])
    for label, colour in READINGS.items():
        for row, novel in enumerate(order):
            gains = [cell["gain"] for cell in metrics[label]["novels"][novel]["cells"]]
            shown = f"{label}: rate {metrics[label]['rate']:g}" if row == 0 else None
            axes.plot(gains, [row] * len(gains), ".", color=colour, label=shown)
    axes.axvline(15, color="black", linewidth=0.6)
    axes.set_yticks(range(len(order)), [name.replace("_", " ") for name in order], fontsize=8)
    axes.set(xlabel="gain on the second half of 64 KB, %", xlim=(0, None))
    axes.set_title("thirteen fresh novels, three models each", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def fresh(axes: Axes) -> None:
    """Gain against forgetting: validation novels over rates as lines, fresh novels at the chosen rates as dots."""
    metrics = newest("fresh_novels")["metrics"]
    for style, (text, curves) in enumerate(metrics["validation"]["curves"].items()):
        for i, curve in enumerate(curves):
            points = [(p["forgetting"], p["gain"]) for p in curve["points"]]
            label = f"{text.replace('_', ' ')} (validation)" if i == 0 else None
            axes.plot(*zip(*points, strict=True), color=f"C{style + 1}", linewidth=0.9, label=label)
    for label, colour in READINGS.items():
        cells = [cell for line in metrics[label]["novels"].values() for cell in line["cells"]]
        axes.plot([c["forgetting"] for c in cells], [c["gain"] for c in cells], ".", color=colour, label=label)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.axhline(15, color="black", linewidth=0.6)
    axes.set(xlabel="forgetting on Shakespeare, %", ylabel="gain, %", ylim=(0, None))
    axes.set_title("Hope-Attention, rates chosen on the validation novels", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def main() -> None:
    """Draw all figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    by_position(axes[0], "it_learns_300")
    by_position(axes[1], "it_learns_1250")
    figure.tight_layout()
    figure.savefig(FIGURES / "it_learns.png", dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    frontier(axes[0], "hope-attention")
    frontier(axes[1], "hope")
    figure.tight_layout()
    figure.savefig(FIGURES / "it_keeps_learning.png", dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    novels(axes[0])
    fresh(axes[1])
    figure.tight_layout()
    figure.savefig(FIGURES / "fresh_novels.png", dpi=110)


if __name__ == "__main__":
    main()
