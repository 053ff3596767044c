"""Ablations: each component of the paper's Table 6 taken out of Hope in turn, and the use of context (Figure 10).

    python -m recipes.ablations --data DIR                     # DIR/lm: books and WikiText-2
    python -m recipes.ablations --data DIR --variants Hope "without DGD"
    python -m recipes.ablations --table                        # the committed result as a table
    python -m recipes.ablations --figure                       # and as docs/figures/ablations.png

The small model, the text, tokens, seeds and Hope's rate of recipes/language_modelling.py (whose Hope it is); the
variants are nestling/models/ablations.py, all with the parameters of the Transformer. They read two novels that nobody
was trained on (recipes/language.py) with the writes that they have; the test file stays closed. A component helps if
taking it out is worse, seed by seed: the interval of the paired differences excludes 0. Two rows are turned round, as
the library's Hope starts from the other side ("adaptive q" adds what Table 6 takes out, "momentum" adds it to the
writes of the levels), and two rows are ours: the levels without writes, and the control of their periods.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.evals.statistics import Interval, paired, verdict
from nestling.models.ablations import ABLATIONS
from recipes import language, language_modelling
from recipes.cells import Cell, cpu_minutes, write_result
from recipes.command import add_data, parser_of, run
from recipes.language import Folder

SIZE = language.SWEPT
OURS: dict[str, dict[str, Any]] = {
    "levels without writes": {"inner_lr": 0.0},
    "one period, equal rates per token": {"periods": (256.0, 256.0), "inner_lr": (0.02, 0.005)},
}
VARIANTS = ABLATIONS | OURS
PAPER = {  # Table 6: perplexity, at 1.3B parameters
    "Hope": 12.24,
    "without DGD": 13.41,
    "without decay": 13.71,
    "without CMS": 13.04,
    "without adaptive k": 13.77,
    "without adaptive v": 13.90,
}
EXTRA = 2  # seeds more for these rows
TURNED = {"adaptive q": 12.19, "momentum": 13.58}  # perplexity of Hope without it, where our row adds it
PARTS = {"novels": "beyond", "novels, second half": "late"}
CONTEXTS = {"Hope": "#c05621", "without DGD": "#2f855a", "levels without writes": "#7a7a7a", "without CMS": "#2b6cb0"}


def label(variant: str) -> str:
    """The name of a variant's cells; Hope's own are those of the language models."""
    return f"hope-{SIZE}" + ("" if variant == "Hope" else "-" + variant.replace(" ", "-").lower())


def values(cells: Sequence[Cell], part: str) -> list[float]:
    """Bits per byte, one per seed."""
    return [found["novels"][way(found)][PARTS[part]] for found in cells]


def way(found: Cell) -> str:
    """How a variant is read: with its writes, if it has any."""
    return "learning" if "learning" in found["novels"] else "frozen"


def differences(cells: dict[str, list[Cell]]) -> dict[str, dict[str, Cell]]:
    """Every variant minus Hope over the seeds of both, and what may be said of the variant."""
    made: dict[str, dict[str, Cell]] = {}
    for variant, found in cells.items():
        if variant != "Hope":
            whole = cells["Hope"][: len(found)]
            for part in PARTS:
                difference = paired(values(found, part), values(whole, part))
                made.setdefault(variant, {})[part] = vars(difference) | {"verdict": verdict(difference)}
    return made


def report(variants: Sequence[str], seeds: int, folder: Folder) -> Path:
    """Run what is missing, seed by seed, and write the result."""
    rate = language.chosen_rate(language.sweep("hope", folder))
    cells: dict[str, list[Cell]] = {variant: [] for variant in variants}
    for seed in range(seeds + EXTRA):
        for variant in [v for v in variants if seed < seeds or v in PAPER]:
            model = language.config_for("hope", SIZE, **VARIANTS[variant])
            cells[variant].append(language.trained(label(variant), model, rate, seed, folder))
    metrics: Cell = {"rate": rate, "cells": cells, "differences to Hope": differences(cells)}
    changed = {variant: str(VARIANTS[variant]) for variant in variants}
    config = language_modelling.settings(folder) | {"size": SIZE, "variants": changed}
    return write_result("ablations", config, list(range(seeds + EXTRA)), metrics)


# --- table and figure -------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: what each variant loses, in bits per byte, beside the paper's perplexities."""
    metrics = result["metrics"]
    whole = metrics["cells"]["Hope"]
    means = " | ".join(f"{language.mean(values(whole, part)):.3f}" for part in PARTS)
    lines = [f"| minus Hope, bits per byte | {' | '.join(PARTS)} | n | paper, perplexity |"]
    lines += ["|---" * (3 + len(PARTS)) + "|", f"| Hope itself | {means} | {len(whole)} | {PAPER['Hope']} |"]
    for variant, parts in metrics["differences to Hope"].items():
        row = " | ".join(language_modelling.difference(parts[part]) for part in PARTS)
        lines.append(f"| {variant} | {row} | {parts['novels']['n']} | {of_paper(variant)} |")
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.0f} CPU minutes together, Hope's own included."])


def of_paper(variant: str) -> str:
    """The paper's figure for a variant."""
    turned = TURNED.get(variant)
    return f"{turned} without it" if turned else str(PAPER.get(variant, ""))


def draw(result: Cell, path: Path) -> None:
    """Differences with their intervals, and the use of context by position (Figure 10)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = result["metrics"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2))
    forest(axes[0], metrics["differences to Hope"])
    context(axes[1], metrics["cells"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def forest(axes: Any, found: dict[str, dict[str, Cell]]) -> None:
    """A row per variant: right of 0 means that the variant is worse than Hope."""
    for i, part in enumerate(PARTS):
        for row, parts in enumerate(found.values()):
            line = Interval(**{k: v for k, v in parts[part].items() if k != "verdict"})
            place = row + 0.22 * (i - 1)
            if line.low is not None:
                axes.plot([line.low, line.high], [place, place], color=f"C{i}", linewidth=1.2)
            axes.plot(line.mean, place, "o", color=f"C{i}", markersize=4, label=part if row == 0 else None)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte − Hope, 95 % interval over seeds", title="one component changed")
    axes.legend(fontsize=8)


def context(axes: Any, cells: dict[str, list[Cell]]) -> None:
    """Differences to the variant without CMS on the same tokens, means over seeds, by position in the window."""
    lines = {v: language_modelling.curve(cells[v], "novels", way(cells[v][0])) for v in CONTEXTS if v in cells}
    zero = lines["without CMS"]
    places = [(i + 0.5) * language.LONG / len(zero) for i in range(len(zero))]
    for variant, line in lines.items():
        gains = [a - b for a, b in zip(line, zero, strict=True)]
        axes.plot(places, gains, color=CONTEXTS[variant], label=variant, linewidth=1.3)
    axes.axvline(language.LENGTH, color="black", linewidth=0.6)
    axes.set(xlabel=f"position, tokens (trained to {language.LENGTH})", title="use of context")
    axes.set(ylabel="bits per byte − without CMS")
    axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("ablations", __doc__)
    add_data(parser)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    if "Hope" not in options.variants:
        parser.error("--variants must name Hope: the others are compared with it")
    run("ablations", options, lambda: report(options.variants, options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
