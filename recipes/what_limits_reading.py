"""What limits Hope-Attention's gain: one cause changed at a time, three seeds, on the text of `it_keeps_learning`.

    python -m recipes.what_limits_reading

Every line is the frontier of three models on 64 KB of Emma: the gain at the most favourable rate within 1 % forgetting,
which is more than any rate chosen beforehand can give. For the first three lines the rate is also chosen beforehand:
the largest of the grid that forgets less than 1 % on average, over the seeds and 64 KB of each of two other novels (a
limit that was set after Emma had been read: docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nestling.evals.frontier import Setting, chosen_rate, frontier, reconfigured
from nestling.evals.statistics import interval, paired
from recipes import it_keeps_learning as reading
from recipes import it_learns
from recipes.cells import Cell, cell, write_result

STEPS, LR, SEEDS = 1250, 4e-3, (0, 1, 2)
CHOOSING = ("moby_dick", "sherlock_holmes")
RUNS = Path("runs/what_limits_reading")
LOW, MIDDLE, HIGH = (0.04, 0.056, 0.08, 0.113), (0.056, 0.08, 0.113, 0.16), (0.113, 0.16, 0.226, 0.32)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change of how the model writes while it reads, and the rates at which it is tried."""

    setting: Setting
    rates: tuple[float, ...]
    writes: dict[str, Any] = field(default_factory=dict)


THREE, ONE = reading.THREE, reading.ONE
VARIANTS = {
    "three periods": Variant(setting=THREE, rates=MIDDLE),
    "one period": Variant(setting=ONE, rates=LOW),
    "one period, erase 0.5": Variant(setting=ONE, rates=MIDDLE, writes={"inner_erase": 0.5}),
    "one period, decay 0.03": Variant(setting=ONE, rates=HIGH, writes={"inner_decay": 0.03}),
    "one period, kappa 30": Variant(setting=ONE, rates=(0.02, 0.028, 0.04, 0.056), writes={"inner_kappa": 30.0}),
}
CHOSEN = ("three periods", "one period", "one period, erase 0.5")
LIMIT = 1.0  # percent of forgetting, on average over the seeds and the novels of CHOOSING


def curve(label: str, seed: int, text: str) -> Cell:
    """The frontier of one variant's model on one text."""
    variant = VARIANTS[label]

    def work() -> Cell:
        trained = it_learns.train_cell("hope-attention", STEPS, LR, seed)
        model, windows = reading.trained("hope-attention", STEPS, LR, seed, it_learns.DEPTH)
        model = reconfigured(model, **variant.writes) if variant.writes else model
        tokens = reading.text_of(text, reading.BYTES)
        found = frontier(model, tokens, windows, variant.rates, variant.setting, stop_at=3.0)
        return found.to_dict() | {"validation": trained["short"], "parameters": trained["parameters"]}

    return cell(RUNS, f"{label.replace(' ', '_')}-{seed}-{text}", work)


def rate_of(label: str) -> float:
    """The largest rate that forgets less than LIMIT on average over the seeds and the other novels."""
    curves = [curve(label, seed, text) for seed in SEEDS for text in CHOOSING]
    return chosen_rate([reading.points_of(c) for c in curves], LIMIT)


def at_chosen_rate(label: str, curves: list[Cell]) -> Cell:
    """What a rate that was chosen beforehand gives, and what it was chosen by."""
    rate = rate_of(label)
    points = [reading.at_rate(c, rate) for c in curves]
    made: Cell = {"chosen rate": rate} | {w: vars(interval([p[w] for p in points])) for w in ("gain", "forgetting")}
    for what in ("gain", "forgetting"):
        print(f"    at {rate:g}, chosen on other novels: {what} {interval([p[what] for p in points])}", flush=True)
    return made | {"choosing": {text: [curve(label, seed, text) for seed in SEEDS] for text in CHOOSING}}


def main() -> None:
    torch.set_num_threads(1)
    metrics: Cell = {"text": reading.TEXT, "bytes": reading.BYTES, "rates chosen on": CHOOSING, "variants": {}}
    first: list[float] = []
    for label in VARIANTS:
        curves = [curve(label, seed, reading.TEXT) for seed in SEEDS]
        best = [c["best_within"]["1"] for c in curves]
        first = first or best
        made: Cell = {"curves": curves, "best within 1 %": vars(interval(best))}
        made["difference to the first"] = vars(paired(best, first))
        print(f"{label:38s} best within 1 % {interval(best)}   difference {paired(best, first)}", flush=True)
        metrics["variants"][label] = made | (at_chosen_rate(label, curves) if label in CHOSEN else {})
    print(write_result("what_limits_reading", {"steps": STEPS, "lr": LR}, list(SEEDS), metrics))


if __name__ == "__main__":
    main()
