"""The page and the figure of `recipes/write_training.py`, from its result file alone."""

from __future__ import annotations

from pathlib import Path

from nestling.evals.statistics import interval
from recipes.cells import Cell, cpu_minutes
from recipes.command import shown
from recipes.write_training_gaps import LINES, SEEDS, UNTRAINED, WEIGHT, line, over_texts


def page(result: Cell) -> str:
    """The result as markdown: what each reads and forgets, what that is against its control, and the rates."""
    metrics = result["metrics"]
    lines = [
        "| reader | rates times | novels, frozen | novels, read | gain, % | stories before, % | stories after, % |"
    ]
    lines.append("|---" * 7 + "|")
    for name, kinds in metrics["readers"].items():
        lines += [f"| {name} | {factor} | {' | '.join(row(metrics, cells))} |" for factor, cells in kinds.items()]
    lines += ["", "Gain and stories in percent, against the untouched model frozen.", ""]
    lines += [f"| of | less | novels read | stories after | novels + {WEIGHT:g} x stories | novels at equal stories |"]
    lines.append("|---" * 6 + "|")
    for gap in metrics["differences"]:
        keys = ("read", "stories after", "worth", "at equal stories")
        values = ["" if gap[k] is None else f"{shown(gap[k], '.4f')} {gap[k]['verdict']}" for k in keys]
        lines.append(f"| {gap['of']} | {gap['less']} | {' | '.join(values)} |")
    lines += ["", "| rates learned (from 0.08) | 1,024, first layer | 1,024 | 512 | 512 | 256, last layer |"]
    lines.append("|---" * 6 + "|")
    for name, cells in metrics["trainings"].items():
        means = [vars(interval(rates)) for rates in zip(*(c["rates"] for c in cells), strict=True)]
        lines.append(f"| {name} | {' | '.join(shown(m, '.3f') for m in means)} |")
    lines += [
        "",
        f"| tried on Moby-Dick, seed 0 | read | stories after | read + {WEIGHT:g} x stories |",
        "|---" * 4 + "|",
    ]
    for name, cell in metrics["chosen by"].items():
        both = (cell["read"], cell["stories after"], cell["read"] + WEIGHT * cell["stories after"])
        lines.append(f"| {name} | {' | '.join(f'{x:.4f}' for x in both)} |")
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.0f} CPU minutes."])


def row(metrics: Cell, cells: Cell) -> list[str]:
    """One reader at one factor: means over the novels, with intervals over the seeds."""
    first = metrics["readers"][UNTRAINED]["1"]
    stories, frozen = over_texts(first, "stories")[0], over_texts(first, "frozen")
    read = over_texts(cells, "read")
    gains = [100 * (1 - r / f) for r, f in zip(read, frozen, strict=True)]
    rises = [[100 * (x / stories - 1) for x in over_texts(cells, key)] for key in ("stories", "stories after")]
    nats = [f"{sum(v) / len(v):.3f}" for v in (over_texts(cells, "frozen"), read)]
    return nats + [shown(vars(interval(v)), ".2f") for v in (gains, *rises)]


def draw(result: Cell, path: Path) -> None:
    """Nats on the novels against nats on the stories, seed by seed; and the rates that were learned, by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = result["metrics"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    for i, (name, kinds) in enumerate(metrics["readers"].items()):
        label = f"{name}, rates times {', '.join(kinds)}" if name in LINES else name
        for seed in range(len(SEEDS)):
            points = line(kinds, seed)[1:]
            style = ".-" if name in LINES else "o"
            left.plot(
                *zip(*points, strict=True), style, color=f"C{i}", linewidth=0.8, label=label if not seed else None
            )
    left.set(xlabel="stories after reading, nats per token", ylabel="novels while reading, nats per token")
    left.legend(fontsize=7)
    for i, (name, cells) in enumerate(metrics["trainings"].items(), 1):
        for seed, made in enumerate(cells):
            rates = made["rates"]
            right.plot(range(1, 1 + len(rates)), rates, f"C{i}.-", linewidth=1, label=name if not seed else None)
    right.set(xlabel="layer (periods 1,024, 1,024, 512, 512, 256)", ylabel="rate", xticks=range(1, 6), ylim=(0, None))
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
