"""Does Hope-Attention gain 15 % at under 1 % forgetting? One frozen setting, read on novels that were never read.

    python -m recipes.it_learns --steps 3000 --seeds 3 --models transformer hope-attention     # trains the models first
    python -m recipes.fresh_novels --data DIR                                        # DIR/lm/gutenberg/*.txt.xz

The setting is the best one of `what_limits_reading` (one period, erase 1/2), its rate the largest that forgets less
than 1 % on average over seeds and the three bundled novels, which are validation text. FRESH and all numbers of this
protocol were written down before any of its novels was looked at; the library's default stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.data import bundled_text
from nestling.data.text import locate, read_text
from nestling.evals.frontier import Setting, chosen_rate, frontier, reconfigured
from nestling.evals.statistics import interval
from recipes import it_keeps_learning as reading
from recipes import it_learns
from recipes import what_limits_reading as limits
from recipes.cells import Cell, cell, write_result

FRESH = (
    "anna_karenina",
    "bleak_house",
    "brothers_karamazov",
    "david_copperfield",
    "don_quixote",
    "great_expectations",
    "grimms_fairy_tales",
    "huckleberry_finn",
    "les_miserables",
    "little_women",
    "ulysses",
    "vanity_fair",
    "war_and_peace",
)
CHOOSING = ("moby_dick", "sherlock_holmes", "emma")
STEPS = 3000
BEST = limits.VARIANTS["one period, erase 0.5"]
DEFAULT_RATE = 0.02
RUNS = Path("runs/fresh_novels")


def curve(seed: int, text: str) -> Cell:
    """The frontier of one model on one validation novel."""

    def work() -> Cell:
        model, windows = reading.trained("hope-attention", STEPS, limits.LR, seed, it_learns.DEPTH)
        model, tokens = reconfigured(model, **BEST.writes), reading.text_of(text, reading.BYTES)
        return frontier(model, tokens, windows, BEST.rates, BEST.setting, stop_at=3.0).to_dict()

    return cell(RUNS, f"{text}-{seed}", work)


def opening(novel: str, folder: str | None) -> Tensor:
    """(1, BYTES) the first bytes of a novel."""
    text = read_text(locate(f"lm/gutenberg/{novel}.txt.xz", folder)).encode()[: reading.BYTES]
    if len(text) < reading.BYTES:
        raise ValueError(f"{novel} has {len(text)} bytes; the protocol reads {reading.BYTES}")
    return torch.tensor([list(text)])


def strange(tokens: Tensor) -> float:
    """Percent of the bytes that the training text has nowhere (typographic quotes, digits, accents)."""
    known = torch.zeros(256, dtype=torch.bool)
    known[torch.tensor(sorted(set(bundled_text("shakespeare").encode())))] = True
    return 100 * (~known[tokens]).double().mean().item()


def read(novel: str, seed: int, rate: float, folder: str | None) -> Cell:
    """Gain and forgetting of the model of one seed on one novel, in the chosen setting and as the library has it."""

    def point(setting: Setting, at: float, **writes: Any) -> Cell:
        model, windows = reading.trained("hope-attention", STEPS, limits.LR, seed, it_learns.DEPTH)
        model = reconfigured(model, **writes) if writes else model
        found = frontier(model, opening(novel, folder), windows, [at], setting).to_dict()
        return found["points"][0] | {"frozen": found["frozen"]}

    def work() -> Cell:
        return {
            "chosen": point(BEST.setting, rate, **BEST.writes),
            "default": point(limits.THREE, DEFAULT_RATE),
            "strange bytes": strange(opening(novel, folder)),
        }

    return cell(RUNS, f"{novel}-{seed}-{rate:g}", work)


def validation() -> Cell:
    """The rate, what it was chosen by, and the models' own validation loss beside the Transformer's."""
    curves = {text: [curve(seed, text) for seed in limits.SEEDS] for text in CHOOSING}
    rate = chosen_rate([reading.points_of(c) for made in curves.values() for c in made], limits.LIMIT)
    made: Cell = {"chosen rate": rate, "limit": limits.LIMIT, "curves": curves, "models": {}}
    for name in ("transformer", "hope-attention"):
        cells = [it_learns.train_cell(name, STEPS, limits.LR, seed) for seed in limits.SEEDS]
        made["models"][name] = [{what: c[what] for what in ("parameters", "short", "curve")} for c in cells]
        print(f"{name:15s} validation {interval([c['short'] for c in cells])}")
    for text, found in curves.items():
        gain, lost = ([reading.at_rate(c, rate)[what] for c in found] for what in ("gain", "forgetting"))
        print(f"{text:20s} gain {interval(gain)}  forgetting {interval(lost)}  (validation, rate {rate:g})")
    return made


def report(rate: float, folder: str | None) -> Cell:
    """Every novel over the seeds, and the mean over novels with its interval over seeds."""
    cells = {novel: [read(novel, seed, rate, folder) for seed in limits.SEEDS] for novel in FRESH}
    metrics: Cell = {"default rate": DEFAULT_RATE, "novels": {}}
    for novel, made in cells.items():
        line: Cell = {"strange bytes": made[0]["strange bytes"], "cells": made}
        for setting in ("chosen", "default"):
            line[setting] = {w: vars(interval([c[setting][w] for c in made])) for w in ("gain", "forgetting")}
        metrics["novels"][novel] = line
        gain, lost = ([c["chosen"][w] for c in made] for w in ("gain", "forgetting"))
        print(f"{novel:20s} gain {interval(gain)}  forgetting {interval(lost)}  strange {line['strange bytes']:.2f} %")
    for setting in ("chosen", "default"):
        for what in ("gain", "forgetting"):
            per_seed = [
                sum(made[s][setting][what] for made in cells.values()) / len(cells) for s in range(len(limits.SEEDS))
            ]
            metrics[f"{setting}, {what}, mean over novels"] = vars(interval(per_seed))
            print(f"{setting:8s} mean {what:10s} {interval(per_seed)}")
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = validation()
    metrics = {"validation": chosen} | report(chosen["chosen rate"], options.data)
    config = {"steps": STEPS, "lr": limits.LR, "setting": vars(BEST.setting), "writes": BEST.writes}
    print(write_result("fresh_novels", config | {"bytes": reading.BYTES}, list(limits.SEEDS), metrics))


if __name__ == "__main__":
    main()
