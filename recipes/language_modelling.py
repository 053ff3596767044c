"""Language modelling: Hope against Transformer++, Gated DeltaNet and Titans at several sizes, and beyond the length.

    python -m recipes.language_modelling --data DIR            # DIR/lm: books and WikiText-2
    python -m recipes.language_modelling --data DIR --sizes small --seeds 1
    python -m recipes.language_modelling --table               # the committed result as a table
    python -m recipes.language_modelling --figure              # and as docs/figures/language_modelling.png

Equal parameters at each size (within 2 %), tokens, data order and seeds; text and measures: recipes/language.py.
Rates: the same three for every model, one seed at the size "small", by the loss on novels beyond the training length.
There the Transformer is read with full attention and with a window of the training length, and the better one counts,
seed by seed. Hope is read with its levels frozen and with their writes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.evals.statistics import Interval, interval, paired, verdict
from recipes import language
from recipes.cells import Cell, cpu_minutes, write_result
from recipes.command import add_data, parser_of, run
from recipes.language import SIZES, Folder, bits

MODELS = ("transformer", "gated-delta-net", "titans-lmm", "hope")
LINES = {  # of the table: the model, and the ways to read it of which the best counts
    "transformer": ("transformer", ("full", "window")),
    "gated-delta-net": ("gated-delta-net", ("frozen",)),
    "titans-lmm": ("titans-lmm", ("frozen",)),
    "hope": ("hope", ("frozen",)),
    "hope, writing": ("hope", ("learning",)),
}
PARTS = {  # of the table: text, and positions
    "held out": ("held out", ""),
    "novels": ("novels", "beyond"),
    "novels, second half": ("novels", "late"),
    "WikiText-2": ("test", "beyond"),
    "WikiText-2, second half": ("test", "late"),
}
COLOURS = {"transformer": "#7a7a7a", "gated-delta-net": "#2f855a", "titans-lmm": "#2b6cb0", "hope": "#c05621"}


def values(models: dict[str, list[Cell]], line: str, part: str) -> list[float]:
    """Bits per byte of a line of the table, one per seed."""
    (name, ways), (text, where) = LINES[line], PARTS[part]
    cells = models[name]
    return bits(cells, text, where, ways) if where else [found[text] for found in cells]


def run_model(name: str, size: str, rate: float, seeds: int, folder: Folder) -> list[Cell]:
    """The cells of a model and size with what they read of the test text, each with its rate.

    A model of which a seed diverges takes the next lower rate for all of them; [] = it diverges at all of the three.
    """
    config = language.config_for(name, size)
    for lr in sorted((lr for lr in language.RATES if lr <= rate), reverse=True):
        made: list[Cell] = []
        for seed in range(seeds):
            found = language.measured(f"{name}-{size}", config, lr, seed, folder)
            if found["loss"] is None:  # what `rounded` makes of NaN
                break
            made.append({"rate": lr} | found)
        else:
            return made
    return []


def lines_of(models: dict[str, list[Cell]]) -> list[str]:
    """The lines of a size: those of the models that did not diverge."""
    return [line for line, (name, _) in LINES.items() if models[name]]


def compare(models: dict[str, list[Cell]]) -> dict[str, dict[str, Cell]]:
    """Hope, frozen and writing, against each other line and itself: paired differences by part, in bits per byte."""
    others = [line for line in lines_of(models) if not line.startswith("hope")]
    pairs = [(mine, other) for mine in ("hope", "hope, writing") for other in others] + [("hope, writing", "hope")]
    made: dict[str, dict[str, Cell]] = {}
    for mine, other in pairs:
        for part in PARTS:
            found = paired(values(models, mine, part), values(models, other, part))
            made.setdefault(f"{mine} - {other}", {})[part] = vars(found) | {"verdict": verdict(found)}
    return made


def report(sizes: Sequence[str], seeds: int, folder: Folder) -> Path:
    """Run what is missing, and write the result."""
    swept = {name: language.sweep(name, folder) for name in MODELS}
    rates = {name: language.chosen_rate(found) for name, found in swept.items()}
    for name, found in swept.items():
        del found[f"{rates[name]:g}"]["cpu_seconds"]  # of a cell that stands below
    models = {size: {name: run_model(name, size, rates[name], seeds, folder) for name in MODELS} for size in sizes}
    metrics: Cell = {"sweep": swept, "chosen rate": rates, "models": models}
    metrics["comparisons"] = {size: compare(cells) for size, cells in models.items()}
    return write_result("language_modelling", settings(folder), list(range(seeds)), metrics)


def settings(folder: Folder) -> Cell:
    """What decides the numbers, as the result file has it."""
    texts = language.corpus(folder)
    return {
        "trained on": language.TRAINED,
        "novels": language.NOVELS,
        "test": language.TEST,
        "pieces": [language.PIECES, texts.tokenizer.fingerprint],
        "training tokens": [len(texts.training), texts.training.fingerprint],
        "rows, length, steps": [language.ROWS, language.LENGTH, language.STEPS],
        "windows": [language.SHORT_WINDOWS, language.LONG_WINDOWS, language.LONG],
        "sizes (width, blocks, heads)": SIZES,
        "levels of hope": str(language.LEVELS),
        "rates": language.RATES,
    }


# --- table and figure -------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: per size a table of bits per byte, and one of Hope's differences."""
    metrics, lines = result["metrics"], []
    titles = " | ".join(PARTS)
    rule = "|---" * (1 + len(PARTS)) + "|"
    for size, models in metrics["models"].items():
        count = models["hope"][0]["parameters"]
        lines += [f"**{size}** ({count:,} parameters)", "", f"| bits per byte | {titles} |", rule]
        for line in lines_of(models):
            lines.append(f"| {line} | {' | '.join(shown(interval(values(models, line, part))) for part in PARTS)} |")
        for name, found in models.items():
            if not found:
                lines += ["", f"{name}: diverged at all rates up to {metrics['chosen rate'][name]:g}."]
            elif found[0]["rate"] < metrics["chosen rate"][name]:
                lines += [
                    "",
                    f"{name}: rate {found[0]['rate']:g}, because it diverged at {metrics['chosen rate'][name]:g}.",
                ]
        lines += ["", f"| difference | {titles} |", rule]
        for pair, found in metrics["comparisons"][size].items():
            lines.append(f"| {pair} | {' | '.join(difference(found[part]) for part in PARTS)} |")
        lines.append("")
    return "\n".join([*lines, f"{cpu_minutes(metrics):.0f} CPU minutes together."])


def shown(found: Interval) -> str:
    """A mean and half of its interval."""
    return f"{found.mean:.3f}" + (f" ± {found.high - found.mean:.3f}" if found.high is not None else "")


def difference(found: Cell) -> str:
    """A paired difference, with its interval if there is one, and bold where that excludes 0."""
    if found["low"] is None:
        return f"{found['mean']:+.3f}"
    text = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return text if found["verdict"] == "no difference shown" else f"**{text}**"


def draw(result: Cell, path: Path) -> None:
    """Loss against size, and by position at the largest size on both texts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = result["metrics"]["models"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    by_size(axes[0], models, "novels")
    largest = list(models)[-1]
    by_position(axes[1], models[largest], "novels", f"two unread novels ({largest})")
    by_position(axes[2], models[largest], "test", f"WikiText-2, test ({largest})")
    axes[1].set(ylabel="bits per byte − Transformer++, window")
    axes[1].plot([], [], color=COLOURS["transformer"], linestyle=":", label="Transformer++, full attention")
    axes[1].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def by_size(axes: Any, models: dict[str, dict[str, list[Cell]]], part: str) -> None:
    """Every seed a dot, the mean a line."""
    for line, (name, ways) in LINES.items():
        having = [size for size, found in models.items() if found[name]]
        cells = [values(models[size], line, part) for size in having]
        counts = [models[size][name][0]["parameters"] for size in having]
        style = {"color": COLOURS[name], "linestyle": "--" if "learning" in ways else "-"}
        axes.plot(counts, [language.mean(found) for found in cells], label=line, **style)
        for count, found in zip(counts, cells, strict=True):
            axes.plot([count] * len(found), found, ".", color=COLOURS[name], markersize=5)
    axes.set(
        xscale="log", xlabel="parameters", ylabel="bits per byte", title=f"{part}, beyond {language.LENGTH} tokens"
    )
    ticks = [found["hope"][0]["parameters"] for found in models.values()]
    axes.set_xticks(ticks, [f"{count / 1e6:.2f}M" for count in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def by_position(axes: Any, models: dict[str, list[Cell]], text: str, title: str) -> None:
    """Differences to the windowed Transformer on the same tokens, means over seeds."""
    zero = curve(models["transformer"], text, "window")
    places = [(i + 0.5) * language.LONG / len(zero) for i in range(len(zero))]
    styles = {"full": ":", "window": "-", "frozen": "-", "learning": "--"}
    for name, colour in COLOURS.items():
        for way in models[name][0][text] if models[name] else ():
            line = [a - b for a, b in zip(curve(models[name], text, way), zero, strict=True)]
            axes.plot(places, line, color=colour, linestyle=styles[way], linewidth=1.3)
    axes.axvline(language.LENGTH, color="black", linewidth=0.6)
    axes.set(xlabel=f"position, tokens (trained to {language.LENGTH})", title=title)


def curve(cells: Sequence[Cell], text: str, way: str) -> list[float]:
    """Bits per byte by position, means over seeds."""
    return [language.mean(column) for column in zip(*(c[text][way]["by position"] for c in cells), strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("language_modelling", __doc__)
    add_data(parser)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("language_modelling", options, lambda: report(options.sizes, options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
