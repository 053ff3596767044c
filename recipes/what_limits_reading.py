"""What limits Hope-Attention's gain: one cause changed at a time, three seeds, on the text of `it_keeps_learning`.

    python -m recipes.what_limits_reading

Every line is the frontier of three models on 64 KB of Emma: the gain at the most favourable rate within 1 % forgetting,
which is more than any rate chosen beforehand can give. For the first three lines the rate is also chosen beforehand:
the largest of the grid that forgets less than half a percent on average, over the seeds and two other novels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nestling.data import held_out_windows
from nestling.evals.frontier import Setting, frontier, reconfigured
from nestling.evals.statistics import interval, paired
from nestling.train import RunConfig, load_run, prepare
from recipes import it_keeps_learning as reading
from recipes import it_learns, lm_small
from recipes.cells import Cell, cell, write_result

STEPS, LR, SEEDS = 1250, 4e-3, (0, 1, 2)
CHOOSING = ("moby_dick", "sherlock_holmes")
RUNS = Path("runs/what_limits_reading")
LOW, MIDDLE, HIGH = (0.04, 0.056, 0.08, 0.113), (0.056, 0.08, 0.113, 0.16), (0.113, 0.16, 0.226, 0.32)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change: of the model's training, or of how it writes while it reads."""

    setting: Setting
    rates: tuple[float, ...]
    run: Callable[..., RunConfig] = lm_small.hope_attention
    depth: int = it_learns.DEPTH
    writes: dict[str, Any] = field(default_factory=dict)


THREE, ONE = reading.THREE, reading.ONE
VARIANTS = {
    "three periods": Variant(setting=THREE, rates=MIDDLE),
    "one period": Variant(setting=ONE, rates=LOW),
    "one period, erase 0.5": Variant(setting=ONE, rates=MIDDLE, writes={"inner_erase": 0.5}),
    "one period, decay 0.03": Variant(setting=ONE, rates=HIGH, writes={"inner_decay": 0.03}),
    "one period, kappa 30": Variant(setting=ONE, rates=(0.02, 0.028, 0.04, 0.056), writes={"inner_kappa": 30.0}),
    "one period, kappa 300": Variant(setting=ONE, rates=HIGH, writes={"inner_kappa": 300.0}),
    "one period, bound 0.008": Variant(setting=ONE, rates=MIDDLE, writes={"inner_bound": 0.008}),
    "three periods, trained without writes": Variant(
        setting=THREE, rates=MIDDLE, run=lm_small.hope_attention_without_writes
    ),
    "three periods, depth 4": Variant(setting=THREE, rates=MIDDLE, depth=4),
}
CHOSEN = ("three periods", "one period", "one period, erase 0.5")


def run_name(variant: Variant, seed: int) -> str:
    """Name of the trained model; those of `it_learns` are the same runs."""
    name = variant.run.__name__.replace("_", "-")
    return it_learns.run_name(name, STEPS, LR, seed, variant.depth)


def curve(label: str, seed: int, text: str) -> Cell:
    """The frontier of one variant's model on one text."""
    variant = VARIANTS[label]

    def work() -> Cell:
        config = variant.run(steps=STEPS, lr=LR, seed=seed, depth=variant.depth)
        name = run_name(variant, seed)
        trained = cell(it_learns.RUNS, name, lambda: it_learns.train_and_measure(config, it_learns.RUNS / name))
        model = load_run(it_learns.RUNS / name)[0]
        model = reconfigured(model, **variant.writes) if variant.writes else model
        windows = held_out_windows(prepare(config).held_out, length=lm_small.LENGTH, count=128)
        tokens = reading.text_of(text, reading.BYTES)
        found = frontier(model, tokens, windows, variant.rates, variant.setting, stop_at=3.0)
        return found.to_dict() | {"validation": trained["short"], "parameters": trained["parameters"]}

    return cell(RUNS, f"{label.replace(' ', '_')}-{seed}-{text}", work)


def chosen_rate(label: str) -> float:
    """The largest rate that forgets less than `ALLOWED` on average over seeds and the other novels."""
    curves = [curve(label, seed, text) for seed in SEEDS for text in CHOOSING]

    def forgetting(rate: float) -> float:
        points = [next((p for p in c["points"] if p["rate"] == rate), None) for c in curves]
        return sum(p["forgetting"] if p else float("inf") for p in points) / len(points)

    allowed = [rate for rate in VARIANTS[label].rates if forgetting(rate) < reading.ALLOWED]
    return max(allowed, default=min(VARIANTS[label].rates))


def at_chosen_rate(label: str, curves: list[Cell]) -> Cell:
    """What a rate that was chosen beforehand gives, and what it was chosen by."""
    rate = chosen_rate(label)
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
