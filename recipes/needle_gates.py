"""What makes Hope lose needles far beyond its training length: one thing changed at reading time, weights as they are.

    python -m recipes.needle_gates                   # after python -m recipes.needles --models hope
    python -m recipes.needle_gates --table           # the committed result as a table
    python -m recipes.needle_gates --figure          # and as docs/figures/needle_gates.png

`generators still`: k, v, eta and alpha come from fixed maps. `no decay`: nothing is forgotten. `gates x S`: what goes
into the sigmoid of eta, weight and bias, is S times as large, so that tokens that write little write less, and those
that write much write more. Nothing is chosen here: every change is shown on the same test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from nestling.evals.statistics import interval, paired, verdict
from nestling.memories.self_modifying import SelfModifyingTitans
from nestling.models import LanguageModel
from recipes import needle_training as training
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import newest, parser_of, run, shown
from recipes.needles import ask, weights

LENGTHS = {4_096: 16, 16_384: 8}  # tokens: examples
TEST_SEED = 14_000
NEVER = 1e4  # as a bias of a sigmoid
RUNS = Path("runs/needle_gates")


# --- changes ----------------------------------------------------------------------------------------------------


def nothing(layer: SelfModifyingTitans) -> None:
    """As trained."""


def still(layer: SelfModifyingTitans) -> None:
    """No memory but the one that is read is written."""
    layer.rate_logit.fill_(-NEVER)


def no_decay(layer: SelfModifyingTitans) -> None:
    """alpha is 1."""
    assert layer.alpha_bias is not None
    layer.alpha_bias.fill_(NEVER)


def sharper(layer: SelfModifyingTitans, factor: float) -> None:
    """The sigmoid of eta sees `factor` times as much."""
    layer.gate_weight[0].mul_(factor)
    layer.eta_bias.mul_(factor)


CHANGES: dict[str, Callable[[SelfModifyingTitans], None]] = {
    "as trained": nothing,
    "generators still": still,
    "no decay": no_decay,
    "gates x 1.5": partial(sharper, factor=1.5),
    "gates x 2": partial(sharper, factor=2.0),
    "gates x 4": partial(sharper, factor=4.0),
}


@torch.no_grad()
def changed(model: LanguageModel, name: str) -> LanguageModel:
    """The model itself, with a change in every layer."""
    for layer in model.modules():
        if isinstance(layer, SelfModifyingTitans):
            CHANGES[name](layer)
    return model


# --- cells ------------------------------------------------------------------------------------------------------


def run_cell(lr: float, seed: int, name: str) -> Cell:
    """What the Hope of a seed answers with a change, by task and length."""

    def work() -> Cell:
        path = weights("hope", lr, seed)
        if not path.is_file():
            raise FileNotFoundError(f"no weights {path}; run python -m recipes.needles --models hope first")
        model = training.make("hope")
        model.load_state_dict(torch.load(path))
        changed(model.eval(), name)
        return {
            task: {str(length): ask(model, task, "test", length, count, TEST_SEED) for length, count in LENGTHS.items()}
            for task in training.TRAINED
        }

    return cell(RUNS, f"{name.replace(' ', '-')}-{lr:g}-{seed}", work)


def report(seeds: int) -> Path:
    """Run what is missing, and write the result."""
    lr = newest("needles")["metrics"]["chosen rate"]["hope"]
    cells: dict[str, list[Cell]] = {name: [] for name in CHANGES}
    for seed in range(seeds):
        for name in CHANGES:
            cells[name].append(run_cell(lr, seed, name))
    config = training.config() | {"examples by length": LENGTHS, "rate": lr}
    return write_result("needle_gates", config, list(range(seeds)), rounded({"cells": cells}))


# --- page -------------------------------------------------------------------------------------------------------


def page(result: Cell) -> str:
    """The result as markdown: bits per asked token and right answers, and bits minus those as trained."""
    cells = result["metrics"]["cells"]
    lines = []
    for task in training.TRAINED:
        lines += ["", f"| {task} | {' | '.join(f'{n}: right, % | bits | minus as trained' for n in LENGTHS)} |"]
        lines.append("|---" * (1 + 3 * len(LENGTHS)) + "|")
        for name, made in cells.items():
            shown_there = []
            for length in map(str, LENGTHS):
                bits, before = ([c[task][length]["bits"] for c in found] for found in (made, cells["as trained"]))
                difference = paired(bits, before)
                right = interval([100 * c[task][length]["exact"] for c in made]).mean
                told = f"{shown(asdict(difference), '.3f')} {verdict(difference)}" if name != "as trained" else ""
                shown_there.append(f"{right:.0f} | {interval(bits).mean:.4f} | {told}")
            lines.append(f"| {name} | {' | '.join(shown_there)} |")
    return "\n".join([*lines[1:], "", f"{cpu_minutes(cells):.1f} CPU minutes."])


def draw(result: Cell, path: Path) -> None:
    """Bits per asked token by change, a panel for each length; a bar is the mean of seeds and tasks, a dot one seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = result["metrics"]["cells"]
    figure, axes = plt.subplots(1, len(LENGTHS), figsize=(9, 3.2), sharey=True)
    for panel, length in zip(axes, map(str, LENGTHS), strict=True):
        for i, made in enumerate(cells.values()):
            bits = [sum(c[task][length]["bits"] for task in training.TRAINED) / len(training.TRAINED) for c in made]
            panel.barh(i, sum(bits) / len(bits), color="C0", alpha=0.6)
            panel.plot(bits, [i] * len(bits), "k.", markersize=4)
        panel.set_yticks(range(len(cells)), list(cells), fontsize=9)
        panel.set_title(f"{int(length):,} tokens", fontsize=10)
        panel.set_xlabel("bits per asked token", fontsize=9)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("needle_gates", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("needle_gates", options, lambda: report(options.seeds), page, draw)


if __name__ == "__main__":
    main()
