"""Does Hope-Attention gain 15 % at under 1 % forgetting? One frozen setting, read on novels that were never read.

    python -m recipes.it_learns --steps 1250 --seeds 3       # trains the models first
    python -m recipes.fresh_novels --data DIR                # DIR/lm/gutenberg/*.txt.xz

The setting is the best one of `what_limits_reading` (one period, erase 1/2), its rate the largest that forgets less
than 1 % on average over seeds and the three bundled novels, which are validation text. FRESH and all numbers of this
protocol were written down before any of its novels was read; the library's default stands beside it.
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
from nestling.evals.frontier import Setting, frontier, reconfigured
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
BEST = "one period, erase 0.5"
DEFAULT_RATE = 0.02
RUNS = Path("runs/fresh_novels")


def chosen_rate() -> float:
    """The largest rate that forgets less than 1 % on average over the seeds and the validation novels."""
    curves = [limits.curve(BEST, seed, text) for seed in limits.SEEDS for text in CHOOSING]

    def forgetting(rate: float) -> float:
        return sum(reading.at_rate(c, rate)["forgetting"] for c in curves) / len(curves)

    shared = set.intersection(*({p["rate"] for p in c["points"]} for c in curves))
    return max(rate for rate in shared if forgetting(rate) < limits.LIMIT)


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
        model, windows = reading.trained("hope-attention", limits.STEPS, limits.LR, seed, it_learns.DEPTH)
        model = reconfigured(model, **writes) if writes else model
        found = frontier(model, opening(novel, folder), windows, [at], setting).to_dict()
        return found["points"][0] | {"frozen": found["frozen"]}

    def work() -> Cell:
        best = limits.VARIANTS[BEST]
        return {
            "chosen": point(best.setting, rate, **best.writes),
            "default": point(limits.THREE, DEFAULT_RATE),
            "strange bytes": strange(opening(novel, folder)),
        }

    return cell(RUNS, f"{novel}-{seed}-{rate:g}", work)


def report(rate: float, folder: str | None) -> Cell:
    """Every novel over the seeds, and the mean over novels with its interval over seeds."""
    cells = {novel: [read(novel, seed, rate, folder) for seed in limits.SEEDS] for novel in FRESH}
    metrics: Cell = {"chosen rate": rate, "chosen on": CHOOSING, "default rate": DEFAULT_RATE, "novels": {}}
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
    metrics = report(chosen_rate(), options.data)
    config = {"steps": limits.STEPS, "lr": limits.LR, "setting": BEST, "bytes": reading.BYTES}
    print(write_result("fresh_novels", config, list(limits.SEEDS), metrics))


if __name__ == "__main__":
    main()
