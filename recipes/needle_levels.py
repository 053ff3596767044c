"""How many CMS levels write, and how often the fastest: needles, and the loss on a book, at 4 x the training length.

    python -m recipes.needle_levels                  # after python -m recipes.needles --models hope
    python -m recipes.needle_levels --table          # the committed result as a table
    python -m recipes.needle_levels --figure         # and as docs/figures/needle_levels.png

The models are the Hopes of recipes.needles, trained without writes. An MLP is the sum of four narrower ones, so each of
their MLPs is also four independent levels, eq. (74), and says the same as long as none writes (`split`). At test time
the first `levels` of the four write while they read, the first every `lowest` tokens and each next one a quarter as
often (nestling.models.ablations.cms). So this asks what writes do to a trained model, and not what training with them
would do. The rate of the writes is chosen on validation text with seed 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.evals.needles import needle_score
from nestling.evals.perplexity import window_losses
from nestling.evals.statistics import Interval, interval, paired, verdict
from nestling.models import LanguageModel
from nestling.models.ablations import COUNTS, LOWEST, cms
from recipes import needle_training as training
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import newest, parser_of, run
from recipes.needles import TEST_SEED, weights

LEVELS = max(COUNTS)
TASK, EXAMPLES, WINDOWS, LENGTH = "s-niah-2", 8, 4, 4 * training.LENGTH
RATES, CHOOSING = (0.04, 0.16, 0.64, 2.56), (2, 256)  # of the writes; chosen with these levels and lowest period
PARTS = 4  # of a window, for the loss by position
RUNS = Path("runs/needle_levels")


def trained(lr: float, seed: int) -> LanguageModel:
    """The Hope of recipes.needles in levels, with the statistics that writes go by from training text."""
    model, path = training.make("hope"), weights("hope", lr, seed)
    if not path.is_file():
        raise FileNotFoundError(f"no weights {path}; run python -m recipes.needles --models hope first")
    model.load_state_dict(torch.load(path))
    made = split(model)
    made.calibrate(book("train", training.LENGTH, 8)[:, :-1])
    return made.eval()


def split(model: LanguageModel) -> LanguageModel:
    """The same function with LEVELS independent levels for each MLP, a part of its hidden width each."""
    made = training.hope(replace(model.config, continuum="independent", **cms(LEVELS, min(LOWEST))))
    rest = {name: w for name, w in model.state_dict().items() if ".channel." not in name}
    made.load_state_dict(rest, strict=False)
    pairs: Any = zip(model.blocks, made.blocks, strict=True)
    for whole, block in pairs:
        old = whole.channel.stack[0].body
        width = old.down.in_features // LEVELS
        up, down = old.up.weight.unflatten(0, (2, LEVELS, width)), old.down.weight.unflatten(1, (LEVELS, width))
        for i, level in enumerate(block.channel.stack):
            level.body.norm.load_state_dict(old.norm.state_dict())
            with torch.no_grad():
                level.body.up.weight.copy_(up[:, i].flatten(0, 1))  # gates, then values
                level.body.down.weight.copy_(down[:, i])
    return made


def book(split: str, length: int, count: int) -> Tensor:
    """(count, length + 1) tokens, from places spread over the text."""
    tokens = torch.from_numpy(training.tokenizer().encode(training.texts()[split]))
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    return torch.stack([tokens[s : s + length + 1] for s in starts.tolist()])


def writing(model: LanguageModel, levels: int, lowest: int, rate: float) -> LanguageModel:
    """The same weights, with the first `levels` of each block's MLPs on their periods; 0 = none writes."""
    rates = (rate,) * levels + (0.0,) * (LEVELS - levels)
    made = training.hope(replace(model.config, **cms(LEVELS, lowest), inner_lr=rates))
    made.load_state_dict(model.state_dict())
    return made.eval()


def losses(model: LanguageModel, split: str, *, learn: bool) -> list[float]:
    """Bits per token of a book, by part of the window."""
    found = window_losses(model, book(split, LENGTH, WINDOWS), learn=learn, rows=WINDOWS)
    return [part.mean().item() / math.log(2) for part in found.chunk(PARTS, dim=1)]


def run_cell(lr: float, seed: int, levels: int, lowest: int, rate: float) -> Cell:
    """Needles and the loss on the test book with these writes."""

    def work() -> Cell:
        model = writing(trained(lr, seed), levels, lowest, rate)
        length, learn = (LENGTH, LENGTH), levels > 0
        found = needle_score(
            model, training.task(TASK, "test"), EXAMPLES, length, seed=TEST_SEED, learn=learn, rows=EXAMPLES
        )
        made = {"exact": found.exact_share, "tokens": found.accuracy, "bits": found.bits}
        return rounded(made | {"book": losses(model, "test", learn=learn)})

    return cell(RUNS, f"{lr:g}-{seed}-{levels}x{lowest}-{rate:g}", work)


def swept_cell(lr: float, rate: float) -> Cell:
    """Bits per token of the second half of validation text, at seed 0."""

    def work() -> Cell:
        found = losses(writing(trained(lr, 0), *CHOOSING, rate), "validation", learn=True)
        return rounded({"bits": sum(found[PARTS // 2 :]) / (PARTS - PARTS // 2)})

    return cell(RUNS, f"sweep-{lr:g}-{rate:g}", work)


def settings() -> list[tuple[int, int]]:
    """(levels, lowest period), no writes first."""
    return [(0, LOWEST[0]), *((levels, lowest) for lowest in LOWEST for levels in COUNTS)]


def label(levels: int, lowest: int) -> str:
    return f"{levels} x {lowest}" if levels else "no writes"


def report(lr: float, seeds: int) -> Path:
    """Run what is missing, and write the result."""
    swept = {f"{rate:g}": swept_cell(lr, rate) for rate in RATES}
    rate = min(RATES, key=lambda r: swept[f"{r:g}"]["bits"])
    cells = {label(*s): [run_cell(lr, seed, *s, rate) for seed in range(seeds)] for s in settings()}
    metrics = {"rate of training": lr, "sweep": swept, "rate of writing": rate, "cells": cells}
    config = training.config() | {"task": TASK, "examples": EXAMPLES, "windows": WINDOWS, "length": LENGTH}
    return write_result("needle_levels", config, list(range(seeds)), metrics)


def page(result: Cell) -> str:
    """The result as markdown, differences paired by seed with the same model without writes."""
    cells = result["metrics"]["cells"]
    still = cells["no writes"]
    lines = [
        "| levels x lowest period | answers right, % | bits per asked token | minus no writes | book, bits per token |"
    ]
    lines = [lines[0] + " minus no writes | |", "|---|---|---|---|---|---|---|"]
    for name, made in cells.items():
        asked = paired([c["bits"] for c in made], [c["bits"] for c in still])
        read = paired([last(c) for c in made], [last(c) for c in still])
        values = [100 * interval([c["exact"] for c in made]).mean, interval([c["bits"] for c in made]).mean]
        shown = [
            f"{values[0]:.3g}",
            f"{values[1]:.3f}",
            between(asked),
            f"{interval([last(c) for c in made]).mean:.3f}",
        ]
        same = name == "no writes"
        shown = [*shown, between(read), "" if same else verdict(read)]
        lines.append(f"| {name} | {' | '.join('' if same and i in (2, 4) else s for i, s in enumerate(shown))} |")
    return "\n".join([*lines, "", f"{cpu_minutes(result['metrics']):.1f} CPU minutes."])


def last(found: Cell) -> float:
    """Bits per token over the second half of the windows."""
    half = found["book"][PARTS // 2 :]
    return sum(half) / len(half)


def between(found: Interval) -> str:
    """mean [low, high]."""
    return f"{found.mean:.3f}" if found.low is None else f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def draw(result: Cell, path: Path) -> None:
    """Bits of the needles and bits of the book, by number of levels, a line for each lowest period."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = result["metrics"]["cells"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    titles = (f"{TASK.upper()} at {LENGTH:,} tokens, bits per asked token", "book, bits per token, second half")
    for panel, title, value in zip(axes, titles, (lambda c: c["bits"], last), strict=True):
        for i, lowest in enumerate(LOWEST):
            names = ["no writes", *(label(levels, lowest) for levels in COUNTS)]
            means = [interval([value(c) for c in cells[name]]).mean for name in names]
            panel.plot((0, *COUNTS), means, color=f"C{i}", marker="o", label=f"lowest period {lowest}")
        panel.set_title(title, fontsize=10)
        panel.set_xticks((0, *COUNTS))
        panel.set_xlabel("levels that write", fontsize=9)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def rate_of_hope() -> float:
    """The rate at which the needles' Hopes were trained."""
    return newest("needles")["metrics"]["chosen rate"]["hope"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("needle_levels", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("needle_levels", options, lambda: report(rate_of_hope(), options.seeds), page, draw)


if __name__ == "__main__":
    main()
