"""Dynamic evaluation: the baselines of language modelling, trained by gradient steps on what they have just read.

    python -m recipes.dynamic_evaluation --data DIR      # trains what recipes.language_modelling has not
    python -m recipes.dynamic_evaluation --table         # the committed result as a table
    python -m recipes.dynamic_evaluation --figure        # and as docs/figures/dynamic_evaluation.png

Hope's levels learn while they read. So can any model: after every `LENGTH` tokens one step of an optimizer on all its
weights, by the loss it has just had on them (Krause et al. 2018), every window from the trained weights. Optimizer and
rate are chosen for each model on the novels, one seed at the size "small", as the levels of Hope were. Weights, windows
and text are those of recipes/language_modelling.py; the Transformer has a window of the training length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.evals.protocol import token_losses
from nestling.evals.statistics import interval, paired, verdict
from nestling.models import LanguageModel, from_config
from recipes import language
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, newest, parser_of, run
from recipes.language import LENGTH, NOVELS, SIZES, SWEPT, TEST, Folder
from recipes.language_modelling import difference, run_model, shown, values

MODELS = ("transformer", "gated-delta-net", "titans-lmm", "hope")
RULES: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr),
}
RATES = {"sgd": (0.03, 0.1, 0.3, 1.0), "adam": (3e-4, 1e-3, 3e-3)}
TEXTS = {"novels": NOVELS, "test": TEST}
PARTS = {"novels": ("novels", "beyond"), "WikiText-2": ("test", "beyond")} | {
    "novels, second half": ("novels", "late"),
    "WikiText-2, second half": ("test", "late"),
}


# --- reading ----------------------------------------------------------------------------------------------------


def read(model: LanguageModel, window: Tensor, rule: str, lr: float) -> Tensor:
    """(T,) losses in nats of a window (T + 1,), each LENGTH tokens read before the step on them. Changes the model."""
    optimizer, state, found = RULES[rule](model.parameters(), lr), None, []
    for begin in range(0, len(window) - 1, LENGTH):
        part = window[None, begin : begin + LENGTH + 1]
        out = model(part[:, :-1], state=state, learn=False)
        nats = token_losses(out.logits, part[:, 1:])
        state = out.state.detach()
        optimizer.zero_grad()
        nats.mean().backward()
        optimizer.step()
        found.append(nats[0].detach())
    return torch.cat(found)


def losses(model: LanguageModel, text: str, rule: str, lr: float, folder: Folder) -> Cell:
    """Bits per byte beyond the training length, in the second half, and by position; None where it diverged."""
    windows, width = language.long_windows(TEXTS[text], folder)
    nats = torch.stack([read(copy.deepcopy(model), window, rule, lr) for window in windows]).double()
    curve = (nats.unflatten(1, (-1, LENGTH)).mean((0, 2)) / (math.log(2) * width)).tolist()
    return {
        "beyond": language.mean(curve[1:]),
        "late": language.mean(curve[len(curve) // 2 :]),
        "by position": curve,
    }


def trained(name: str, size: str, lr: float, seed: int) -> LanguageModel:
    """The model of a cell of recipes.language_modelling, the Transformer with its window."""
    model = from_config(language.config_for(name, size))
    model.load_state_dict(torch.load(language.RUNS / f"{name}-{size}-{lr:g}-{seed}.pt", weights_only=True))
    return language.readers(model)["window" if name == "transformer" else "frozen"][0]


# --- cells ------------------------------------------------------------------------------------------------------


def trained_cells(name: str, size: str, seeds: int, folder: Folder) -> list[Cell]:
    """The cells of recipes.language_modelling at the rate that its committed table has."""
    rate = newest("language_modelling")["metrics"]["models"][size][name][0]["rate"]
    return run_model(name, size, rate, seeds, folder)


def read_cell(name: str, size: str, seed: int, text: str, rule: str, lr: float, folder: Folder) -> Cell:
    """What a model reads with these steps."""
    rate = trained_cells(name, size, seed + 1, folder)[seed]["rate"]
    label = f"dynamic-{name}-{size}-{seed}-{text}-{rule}-{lr:g}"
    return cell(language.RUNS, label, lambda: rounded(losses(trained(name, size, rate, seed), text, rule, lr, folder)))


def sweep(name: str, folder: Folder) -> dict[str, Cell]:
    """Bits per byte on the novels by optimizer and rate, at seed 0 and the size `SWEPT`."""
    made = {}
    for rule, rates in RATES.items():
        for lr in rates:
            found = read_cell(name, SWEPT, 0, "novels", rule, lr, folder)
            made[f"{rule} {lr:g}"] = {"novels": found["beyond"]}
    return made


def chosen(swept: dict[str, Cell]) -> tuple[str, float]:
    """The optimizer and rate with the least loss; one that diverged (None) is never chosen."""
    known = {label: found["novels"] for label, found in swept.items() if found["novels"] is not None}
    rule, lr = min(known, key=lambda label: known[label]).split()
    return rule, float(lr)


def report(sizes: Sequence[str], seeds: int, folder: Folder) -> Path:
    """Read what is missing, and write the result."""
    still = {size: {name: trained_cells(name, size, seeds, folder) for name in MODELS} for size in sizes}
    swept = {name: sweep(name, folder) for name in MODELS}
    rules = {name: chosen(found) for name, found in swept.items()}
    models: Cell = {}
    for size in sizes:
        models[size] = {}
        for name in MODELS:
            models[size][name] = [
                {text: read_cell(name, size, seed, text, *rules[name], folder) for text in TEXTS}
                for seed in range(seeds)
            ]
    metrics: Cell = {"still": still, "sweep": swept, "chosen": rules, "models": models, "comparisons": {}}
    for size in sizes:
        metrics["comparisons"][size] = compare(still[size], models[size], seeds)
    config = {"segment": LENGTH, "rates": RATES, "sizes (width, blocks, heads)": SIZES}
    return write_result("dynamic_evaluation", config, list(range(seeds)), metrics)


def compare(still: Cell, dynamic: Cell, seeds: int) -> Cell:
    """Hope with its levels writing minus each model with dynamic evaluation, and what that gained each; by part."""
    made: Cell = {}
    for name, cells in dynamic.items():
        for part, (text, where) in PARTS.items():
            theirs = [found[text][where] for found in cells]
            hope, before = values(still, "hope, writing", part)[:seeds], values(still, name, part)[:seeds]
            for label, found in (
                (f"hope, writing - {name}, dynamic", paired(hope, theirs)),
                (f"{name}, dynamic - {name}", paired(theirs, before)),
            ):
                made.setdefault(label, {})[part] = vars(found) | {"verdict": verdict(found)}
    return made


# --- table and figure -------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: bits per byte of each model with dynamic evaluation, and differences."""
    metrics = result["metrics"]
    lines = ["chosen: " + ", ".join(f"{name} {rule} {lr:g}" for name, (rule, lr) in metrics["chosen"].items())]
    rule = "|---" * (1 + len(PARTS)) + "|"
    for size, models in metrics["models"].items():
        lines += ["", f"**{size}**", "", f"| bits per byte, dynamic evaluation | {' | '.join(PARTS)} |", rule]
        for name, cells in models.items():
            means = [interval([found[text][where] for found in cells]) for text, where in PARTS.values()]
            lines.append(f"| {name} | {' | '.join(map(shown, means))} |")
        lines += ["", f"| difference | {' | '.join(PARTS)} |", rule]
        for label, found in metrics["comparisons"][size].items():
            lines.append(f"| {label} | {' | '.join(difference(found[part]) for part in PARTS)} |")
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.0f} CPU minutes."])


def draw(result: Cell, path: Path) -> None:
    """Hope with its levels writing minus each other model with dynamic evaluation, by size, on both texts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = result["metrics"]["comparisons"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, part in zip(axes, ("novels", "WikiText-2"), strict=True):
        for i, name in enumerate(result["metrics"]["models"][next(iter(found))]):
            made = [found[size][f"hope, writing - {name}, dynamic"][part] for size in found]
            places = [place + 0.08 * (i - 1.5) for place in range(len(made))]
            means = [one["mean"] for one in made]
            error = [[one["high"] - one["mean"] if one["high"] is not None else 0.0 for one in made]] * 2
            panel.errorbar(places, means, yerr=error, fmt="o", markersize=4, capsize=2, label=name, color=f"C{i}")
        panel.axhline(0, color="0.6", linewidth=1)
        panel.set_xticks(range(len(found)), list(found))
        panel.set_title(part, fontsize=10)
    axes[0].set_ylabel("bits per byte: Hope, writing,\nminus the model, dynamic")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("dynamic_evaluation", __doc__)
    add_data(parser)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("dynamic_evaluation", options, lambda: report(options.sizes, options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
