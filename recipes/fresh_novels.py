"""Does Hope-Attention gain 15 % at under 1 % forgetting? One frozen setting, read on novels that were never read.

    python -m recipes.it_learns --steps 3000 --seeds 3 --models transformer hope-attention     # trains the models first
    python -m recipes.fresh_novels --data DIR                                        # DIR/lm/gutenberg/*.txt.xz

The setting is the best one of `what_limits_reading` (one period, erase 1/2). Its rate is the largest that forgets less
than a limit on average over seeds and the three bundled novels, which are validation text: with 1 % as the limit, the
first that was read here, and with the 0.5 % of `it_keeps_learning`. FRESH and both limits were written down before any
of its novels was looked at; that the 0.5 % would be read too was decided after the 1 % had been.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nestling.data import bundled_text
from nestling.data.text import locate, read_text
from nestling.evals.frontier import chosen_rate, frontier, reconfigured
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
LIMITS = (1.0, reading.ALLOWED)  # percent of forgetting, on average over seeds and the novels of CHOOSING
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


def read(novel: str, seed: int, rate: float | None, folder: str | None) -> Cell:
    """Gain and forgetting of one model on one novel: in the best setting at `rate`, or as the library has it (None)."""

    def work() -> Cell:
        model, windows = reading.trained("hope-attention", STEPS, limits.LR, seed, it_learns.DEPTH)
        model = model if rate is None else reconfigured(model, **BEST.writes)
        setting = limits.THREE if rate is None else BEST.setting
        found = frontier(model, opening(novel, folder), windows, [rate or DEFAULT_RATE], setting).to_dict()
        return found["points"][0] | {"frozen": found["frozen"]}

    return cell(RUNS, f"{novel}-{seed}-" + ("default" if rate is None else f"{rate:g}"), work)


def validation() -> Cell:
    """The rates, what they were chosen by, and the models' own validation loss beside the Transformer's."""
    curves = {text: [curve(seed, text) for seed in limits.SEEDS] for text in CHOOSING}
    points = [reading.points_of(c) for made in curves.values() for c in made]
    made: Cell = {
        "curves": curves,
        "rates": {f"{limit:g}": chosen_rate(points, limit) for limit in LIMITS},
        "models": {},
    }
    for name in ("transformer", "hope-attention"):
        cells = [it_learns.train_cell(name, STEPS, limits.LR, seed) for seed in limits.SEEDS]
        made["models"][name] = [{what: c[what] for what in ("parameters", "short", "curve")} for c in cells]
        print(f"{name:15s} validation {interval([c['short'] for c in cells])}")
    for limit, rate in made["rates"].items():
        for text, found in curves.items():
            print(f"validation, limit {limit} %: {text:18s}", summary([reading.at_rate(c, rate) for c in found])[1])
    return made


def summary(cells: Sequence[Cell]) -> tuple[Cell, str]:
    """Intervals of gain and forgetting, and a line of print."""
    made = {what: interval([c[what] for c in cells]) for what in ("gain", "forgetting")}
    words = "  ".join(f"{what} {value}" for what, value in made.items())
    return {what: vars(value) for what, value in made.items()}, words


def report(rates: dict[str, float], folder: str | None) -> Cell:
    """Every novel over the seeds, and the mean over novels with its interval over seeds, at each limit and as it is."""
    metrics: Cell = {"strange bytes": {novel: strange(opening(novel, folder)) for novel in FRESH}}
    for label, rate in {**{f"limit {limit} %": r for limit, r in rates.items()}, "default": None}.items():
        cells = {novel: [read(novel, seed, rate, folder) for seed in limits.SEEDS] for novel in FRESH}
        lines: Cell = {}
        for novel, made in cells.items():
            found, words = summary(made)
            lines[novel] = found | {"cells": made}
            print(f"{label:12s} {novel:20s} {words}")
        means = [
            {what: sum(made[i][what] for made in cells.values()) / len(cells) for what in ("gain", "forgetting")}
            for i in range(len(limits.SEEDS))
        ]
        found, words = summary(means)
        print(f"{label:12s} {'mean over novels':20s} {words}")
        metrics[label] = {"rate": rate or DEFAULT_RATE, "mean over novels": found, "novels": lines}
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = validation()
    metrics = {"validation": chosen} | report(chosen["rates"], options.data)
    config = {"steps": STEPS, "lr": limits.LR, "setting": vars(BEST.setting), "writes": BEST.writes}
    print(write_result("fresh_novels", config | {"bytes": reading.BYTES}, list(limits.SEEDS), metrics))


if __name__ == "__main__":
    main()
