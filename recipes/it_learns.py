"""It learns: Hope and Hope-Attention against Transformer++ at equal parameters, tokens, data order and seeds.

    python -m recipes.it_learns --steps 300 --seeds 5
    python -m recipes.it_learns --steps 1250 --seeds 3
    python -m recipes.it_learns --steps 1250 --seeds 3 --depth 4 --models transformer hope-attention

Rates are swept with one seed at 300 steps and two blocks on validation text and then frozen (the same three values for
every model). Beyond the training length the Transformer is read with full attention and with a window of that length.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nestling.data import Tokens, held_out_windows
from nestling.evals.perplexity import window_losses
from nestling.evals.statistics import interval, paired
from nestling.models import LanguageModel, from_config
from nestling.train import RunConfig, load_run, read_metrics, run
from recipes import lm_small
from recipes.cells import Cell, cell, write_result

RATES = (2e-3, 4e-3, 8e-3)
MODELS = {"transformer": lm_small.transformer, "hope-attention": lm_small.hope_attention, "hope": lm_small.hope}
DEPTH = 2
LENGTH, BEYOND = lm_small.LENGTH, 4 * lm_small.LENGTH
RUNS = Path("runs/it_learns")


def run_name(name: str, steps: int, lr: float, seed: int, depth: int) -> str:
    """The name of a training run, of its cell and of its folder."""
    return f"{name}-{steps}-{lr:g}-{seed}" + (f"-depth{depth}" if depth != DEPTH else "")


def train_cell(name: str, steps: int, lr: float, seed: int, depth: int = DEPTH) -> Cell:
    """Train one model and measure it on validation text: at the training length and at four times that."""
    folder = RUNS / run_name(name, steps, lr, seed, depth)
    config = MODELS[name](steps=steps, lr=lr, seed=seed, depth=depth)
    return cell(RUNS, folder.name, lambda: train_and_measure(config, folder))


def train_and_measure(config: RunConfig, folder: Path) -> Cell:
    """Train in a run folder, or go on in it, and measure on validation text."""
    prepared, result = run(config, folder, resume=folder.exists())
    if not result.finished:
        raise SystemExit(f"stopped at step {result.step}; run the same command again to go on")
    model = load_run(folder)[0]
    curve = [line["validation"]["loss"] for line in read_metrics(folder / "metrics.jsonl") if "validation" in line]
    return {"parameters": model.num_parameters(), "curve": curve, **measure(model, prepared.held_out)}


def measure(model: LanguageModel, held_out: Tokens) -> Cell:
    """Validation nats per byte, all levels frozen: windows of the training length, and of four times that."""
    short = held_out_windows(held_out, length=LENGTH, count=256)
    long = held_out_windows(held_out, length=BEYOND, count=64)
    made: Cell = {"short": window_losses(model, short).mean().item()}
    readers = {"long": model}
    if model.config.name == "transformer":
        windowed = from_config(replace(model.config, window=LENGTH))
        windowed.load_state_dict(model.state_dict())
        readers = {"long full": model, "long window": windowed}
    for name, reader in readers.items():
        losses = window_losses(reader, long)
        made[name] = losses.mean().item()
        made[f"{name} by position"] = losses.view(len(losses), 16, -1).mean((0, 2)).tolist()
    if model.config.name != "transformer":
        made["long, learning"] = window_losses(model, long, learn=True).mean().item()
    made["long best"] = min(value for key, value in made.items() if key in ("long", "long full", "long window"))
    return made


def sweep(name: str) -> dict[str, float]:
    """Validation loss of one seed at 300 steps by learning rate."""
    return {f"{lr:g}": train_cell(name, 300, lr, 0)["short"] for lr in RATES}


def chosen_lr(name: str) -> float:
    """The rate that the sweep chose."""
    losses = sweep(name)
    return min(RATES, key=lambda lr: losses[f"{lr:g}"])


def report(steps: int, seeds: int, depth: int, names: Sequence[str]) -> Path:
    """Paired differences to the Transformer, seed by seed, and the result file."""
    chosen = {name: chosen_lr(name) for name in names}
    cells = {name: [train_cell(name, steps, chosen[name], seed, depth) for seed in range(seeds)] for name in names}
    metrics: Cell = {
        "sweep at 300 steps": {name: sweep(name) for name in names},
        "chosen rate": chosen,
        "models": cells,
        "comparisons": {},
    }
    for name in names:
        if name == "transformer":
            continue
        for what in ("short", "long best"):
            mine, theirs = ([c[what] for c in cells[m]] for m in (name, "transformer"))
            difference = paired(mine, theirs)
            metrics["comparisons"][f"{name} - transformer, {what}"] = vars(difference) | {
                "verdict": "better" if difference.excludes_zero and difference.mean < 0 else "no improvement shown"
            }
            print(f"{name:15s} {what:10s} {interval(mine)}   transformer {interval(theirs)}   difference {difference}")
    config = {name: MODELS[name](steps=steps, lr=chosen[name], depth=depth).to_dict() for name in names}
    return write_result(result_name("it_learns", steps, depth), config, list(range(seeds)), metrics)


def result_name(recipe: str, steps: int, depth: int) -> str:
    """The folder of a recipe's results."""
    return f"{recipe}_{steps}" + (f"_depth{depth}" if depth != DEPTH else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks of every model")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    options = parser.parse_args(argv)
    if "transformer" not in options.models:
        parser.error("--models must name transformer: the others are compared with it")
    torch.set_num_threads(1)
    print(report(options.steps, options.seeds, options.depth, options.models))


if __name__ == "__main__":
    main()
