"""The result of the formal languages as markdown and as a figure (`recipes.formal_languages --table`, `--figure`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from nestling.evals.formal_languages import PAPER
from nestling.evals.statistics import paired, verdict
from recipes.cells import Cell, cpu_minutes


def page(result: Cell) -> str:
    """The result as markdown: the six languages in one table, and what every model reads by chunk size and length."""
    metrics, lines = result["metrics"], []
    titles = [f"{low}-{high}" for low, high in metrics["bins"]]
    for name, cells in (*metrics["cells"].items(), *confirmed(metrics)):
        rate = metrics["chosen rate"].get(name, metrics["chosen rate"].get("hope"))
        lines += ["", f"**{name}** (rate {rate:g})", ""]
        lines += [f"| language | chunk | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
        for language, seeds in cells.items():
            for chunk in seeds[0]["read"]:
                row = [shown(shares(seeds, i, chunk)) for i in range(len(titles))]
                lines.append(f"| {language} | {chunk} | {' | '.join(row)} |")
    took = f"Wholly right strings, %, one number per seed. {cpu_minutes(metrics):.0f} CPU minutes."
    return "\n".join([took, "", *overview(result), "", *differences(result), *lines])


def confirmed(metrics: Cell) -> list[tuple[str, Cell]]:
    """The seeds that chose nothing, as a row of the page."""
    return [("hope, seeds that chose nothing", metrics["confirmation"])] if "confirmation" in metrics else []


def shown(shares: Sequence[int]) -> str:
    """One number where all seeds agree."""
    return str(shares[0]) if len(set(shares)) == 1 else " / ".join(map(str, shares))


def overview(result: Cell) -> list[str]:
    """Models by languages, at up to four times the length; chunked models read at chunk 16."""
    metrics, length = result["metrics"], result["config"]["length"]
    place = four_times(result)
    languages = list(dict.fromkeys(k for cells in metrics["cells"].values() for k in cells))
    lines = [f"| {length + 1}-{4 * length} | {' | '.join(languages)} |", "|---" * (1 + len(languages)) + "|"]
    for name, cells in metrics["cells"].items():
        row = [shown(shares(cells[k], place)) if k in cells else "" for k in languages]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def four_times(result: Cell) -> int:
    """Place of the bin that ends at four times the training length."""
    length = result["config"]["length"]
    return [list(one) for one in result["metrics"]["bins"]].index([length + 1, 4 * length])


def differences(result: Cell) -> list[str]:
    """Hope against every other model at up to four times the length: points and what may be said, seed by seed."""
    cells, place = result["metrics"]["cells"], four_times(result)
    lines = ["| hope minus | language | points | hope is |", "|---|---|---|---|"]
    for other in (name for name in cells if "hope" in cells and name != "hope"):
        for language in cells[other]:
            gap = paired(shares(cells["hope"][language], place), shares(cells[other][language], place))
            lines.append(f"| {other} | {language} | {gap} | {verdict(gap, smaller_is_better=False)} |")
    return lines if len(lines) > 2 else []


def shares(seeds: Sequence[Cell], place: int, chunk: str = "16") -> list[int]:
    """Wholly right strings in % of every seed in one bin of lengths."""
    return [round(100 * c["read"].get(chunk, c["read"].get("any"))[place][0]) for c in seeds]


def draw(result: Cell, path: Path) -> None:
    """Wholly right strings by model and length, the least of the seeds, a panel for each language."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = result["metrics"]
    languages = list(dict.fromkeys(k for cells in metrics["cells"].values() for k in cells))
    columns = 3 if len(languages) <= len(PAPER) else 5
    names = list(metrics["cells"])
    titles = [f"{low}-{high}" for low, high in metrics["bins"]]
    figure, axes = plt.subplots(2, columns, figsize=(3.2 * columns + 1, 6.4), sharex=True, sharey=True)
    for panel in axes.flat[len(languages) :]:
        panel.set_visible(False)
    for panel, language in zip(axes.flat, languages, strict=False):
        least = [
            [min(shares(cells[language], i)) if language in cells else math.nan for i in range(len(titles))]
            for cells in metrics["cells"].values()
        ]
        panel.imshow(least, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for row, column in product(range(len(names)), range(len(titles))):
            share = least[row][column]
            label, colour = "" if math.isnan(share) else f"{share:g}", "white" if share > 60 else "black"
            panel.text(column, row, label, ha="center", va="center", fontsize=8, color=colour)
        panel.set_title(language, fontsize=10)
        panel.set_xticks(range(len(titles)), titles, fontsize=7)
        panel.set_yticks(range(len(names)), names, fontsize=8)
    figure.supxlabel(
        f"symbols (trained to {result['config']['length']}); strings without a wrong position, %, least seed",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
