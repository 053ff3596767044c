"""It keeps learning: models that were trained on Shakespeare read 64 KB of a novel, with writes on and frozen.

    python -m recipes.it_learns --steps 1250 --seeds 3          # trains the models first
    python -m recipes.it_keeps_learning --steps 1250 --seeds 3
    python -m recipes.it_keeps_learning --steps 1250 --seeds 3 --depth 4 --models hope-attention

Gain: bits per byte over the second half of the text against the same model frozen. Forgetting: rise of the loss on
held-out Shakespeare with the fast weights after `reset_context()`. The rate is chosen on another novel with the model
of seed 0 (the largest whose forgetting stays below half a percent) and then frozen. Attention has a window of the
training length everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nestling.data import bundled_text, held_out_windows
from nestling.evals.frontier import Point, Setting, chosen_rate, frontier, settings
from nestling.evals.reading import read_text
from nestling.evals.statistics import interval, paired
from nestling.models import LanguageModel, from_config
from nestling.train import load_run, prepare
from recipes import it_learns, lm_small
from recipes.cells import Cell, cell, write_result

GRID = (0.02, 0.04, 0.08, 0.16, 0.32)
ALLOWED = 0.5  # percent of forgetting when the rate is chosen
TEXT, CHOOSING, BYTES = "emma", "moby_dick", 65_536
RUNS = Path("runs/it_keeps_learning")
READERS = ("hope-attention", "hope")
THREE, ONE, CONTROL = settings(lm_small.PERIODS)


def text_of(name: str, count: int) -> Tensor:
    """(1, count) bytes of a bundled text."""
    return torch.tensor([list(bundled_text(name).encode()[:count])])


def trained(name: str, steps: int, lr: float, seed: int, depth: int) -> tuple[LanguageModel, Tensor]:
    """A model of `it_learns`, and held-out windows of its training domain."""
    prepared = prepare(it_learns.MODELS[name](steps=steps, lr=lr, seed=seed, depth=depth))
    model = load_run(it_learns.RUNS / it_learns.run_name(name, steps, lr, seed, depth))[0]
    if model.config.window is None and name == "transformer":
        windowed = from_config(replace(model.config, window=lm_small.LENGTH))
        windowed.load_state_dict(model.state_dict())
        model = windowed
    return model, held_out_windows(prepared.held_out, length=lm_small.LENGTH, count=128)


def curve_cell(
    name: str, steps: int, lr: float, seed: int, depth: int, setting: Setting, text: str, count: int
) -> Cell:
    """The frontier of one model and setting on one text."""

    def work() -> Cell:
        model, windows = trained(name, steps, lr, seed, depth)
        return frontier(model, text_of(text, count), windows, GRID, setting, stop_at=6.0).to_dict()

    run = it_learns.run_name(name, steps, lr, seed, depth)
    return cell(RUNS, f"{run}-{text}-{setting.name.replace(' ', '_')}", work)


def points_of(curve: Cell) -> list[Point]:
    """The points of a saved curve."""
    return [Point(**p) for p in curve["points"]]


def at_rate(curve: Cell, rate: float) -> Cell:
    """The point of a curve at a rate of the grid."""
    return next(p for p in curve["points"] if p["rate"] == rate)


def baseline(steps: int, lr: float, seed: int, depth: int) -> Cell:
    """The windowed Transformer on the same text: nats over the second half."""

    def work() -> Cell:
        model, _ = trained("transformer", steps, lr, seed, depth)
        return {"frozen": read_text(model, text_of(TEXT, BYTES), learn=False, call_size=4096).nats(0.5)}

    return cell(RUNS, f"{it_learns.run_name('transformer', steps, lr, seed, depth)}-{TEXT}", work)


def report(steps: int, seeds: int, depth: int, names: Sequence[str], rates: dict[str, float]) -> Path:
    """All curves, and the comparisons at the rate that was chosen on the other text."""
    metrics: Cell = {"grid": GRID, "text": TEXT, "bytes": BYTES, "rate chosen on": CHOOSING, "readers": {}}
    metrics["transformer"] = [baseline(steps, rates["transformer"], seed, depth) for seed in range(seeds)]
    for name in names:
        lr = rates[name]
        choosing = curve_cell(name, steps, lr, 0, depth, THREE, CHOOSING, BYTES // 2)
        pick = chosen_rate([points_of(choosing)], ALLOWED)
        curves = {
            s.name: [curve_cell(name, steps, lr, seed, depth, s, TEXT, BYTES) for seed in range(seeds)]
            for s in (THREE, ONE, CONTROL)
        }
        points = [at_rate(c, pick) for c in curves[THREE.name]]
        made: Cell = {"chosen rate": pick, "curves": curves}
        for what in ("gain", "forgetting"):
            made[what] = vars(interval([p[what] for p in points]))
            print(f"{name:15s} rate {pick:g} {what:10s} {interval([p[what] for p in points])}")
        for percent in ("0.5", "1"):
            best = {s: [c["best_within"][percent] for c in cs] for s, cs in curves.items()}
            for s in (ONE.name, CONTROL.name):
                difference = paired(best[THREE.name], best[s])
                made[f"{THREE.name} - {s}, gain within {percent} % forgetting"] = vars(difference)
                print(f"{name:15s} {THREE.name} - {s} within {percent} %: {difference}")
        metrics["readers"][name] = made
    return write_result(
        it_learns.result_name("it_keeps_learning", steps, depth), {"trained with": rates}, list(range(seeds)), metrics
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=it_learns.DEPTH, help="blocks of every model")
    parser.add_argument("--models", nargs="+", choices=READERS, default=list(READERS))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rates = {name: it_learns.chosen_lr(name) for name in ("transformer", *options.models)}
    print(report(options.steps, options.seeds, options.depth, options.models, rates))


if __name__ == "__main__":
    main()
