"""What M3's slow memory does to training: one thing changed at a time, against Muon on the same seeds.

    python -m recipes.what_m3_needs --data DIR

Validation loss of the MLP and the ViT of learning_tasks.py at equal steps, at one rate for all, with seeds that no
report uses. Writes results/what_m3_needs/<date>-<hardware>.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling import optim
from nestling.evals.statistics import interval, paired, verdict
from nestling.optim.base import Group, State, decay_weights
from nestling.optim.m3 import NS_EPS, slow_keys
from nestling.optim.orthogonal import add_scaled, orthogonalize
from recipes.cells import Cell, cell, rounded, write_result
from recipes.learning_tasks import TASKS, Folder
from recipes.optimizer_tasks import trained
from recipes.optimizer_zoo import ZOO, Make

RATES = {"mlp": 3e-3, "vit": 9e-3}  # Muon's best
SEEDS = (101, 102, 103)
RUNS = Path("runs/what_m3_needs")


class Joined(optim.M3):
    """M3 that sums its memories first and orthogonalises the sum once: NS(m + sum_k alpha_k s_k)."""

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        m, beta = [state["momentum_buffer"] for state in states], group["betas"][0]
        torch._foreach_lerp_(m, grads, 1 - beta)
        total = list(torch._foreach_lerp(grads, m, beta))
        for k, (_, kept, alpha) in enumerate(group["slow"]):
            s = [state[slow_keys(k)[0]] for state in states]
            torch._foreach_lerp_(s, grads, 1 - kept)
            torch._foreach_add_(total, s, alpha=alpha)
        decay_weights(params, group)
        add_scaled(params, orthogonalize(total, group, NS_EPS), group)


def m3(kind: type[optim.M3] = optim.M3, **options: Any) -> Make:
    """M3 with some options changed; without a horizon where none is named."""
    options = {"horizon": None, **options}
    return lambda model, lr: optim.param_groups(model, lr, matrices=kind, weight_decay=0.0, **options)


VARIANTS: dict[str, Make] = {
    "Muon": ZOO["Muon"].make,
    "no slow memory": m3(slow=()),
    "period 10, kept 0.9, weight 0.2": m3(slow=((10, 0.9, 0.2),)),
    "weight 0.1": m3(slow=((10, 0.9, 0.1),)),
    "weight 0.5": m3(slow=((10, 0.9, 0.5),)),
    "kept 0.5": m3(slow=((10, 0.5, 0.2),)),
    "horizon 0.1": m3(slow=((10, 0.9, 0.2),), horizon=0.1),
    "period 2, kept 0.9": m3(slow=((2, 0.9, 0.2),)),
    "no second moment": m3(slow=((10, 0.9, 0.2),), betas=(0.95, None)),
    "second moment alone, eps 0.1": m3(slow=(), eps=0.1),
    "second moment alone, eps 1": m3(slow=(), eps=1.0),
    "fast memory 0.9": m3(slow=((10, 0.9, 0.2),), betas=(0.9, 0.999)),
    "summed before Newton-Schulz": m3(Joined, slow=((1, 0.99, 1.0),), betas=(0.95, None)),
}


FEW = (  # for the tasks that take longer
    "Muon",
    "no slow memory",
    "period 10, kept 0.9, weight 0.2",
    "weight 0.1",
    "kept 0.5",
    "horizon 0.1",
)


def validation_loss(label: str, task: str, seed: int, folder: Folder) -> float:
    """Of one run; infinite where it diverged."""
    steps = TASKS[task].steps
    name = f"{task}-{label.replace(', ', '-').replace(' ', '-')}-{seed}"
    made = cell(RUNS, name, lambda: trained(task, VARIANTS[label], RATES[task], seed, steps, folder, ("validation",)))
    return math.inf if made["validation loss"] is None else made["validation loss"]


def report(names: Sequence[str], folder: Folder) -> Path:
    """Every variant on every task, and its paired difference to Muon."""
    metrics: Cell = {}
    for task in names:
        made: dict[str, Cell] = {}
        labels = tuple(VARIANTS) if task == "mlp" else FEW
        losses = {label: [validation_loss(label, task, seed, folder) for seed in SEEDS] for label in labels}
        for label, values in losses.items():
            difference = paired(values, losses["Muon"])
            made[label] = {"losses": values, "difference to Muon": vars(difference), "verdict": verdict(difference)}
            print(f"{task:12s} {label:34s} {interval(values)}   - Muon {difference} {verdict(difference)}", flush=True)
        metrics[task] = made
    return write_result("what_m3_needs", {"rates": RATES}, list(SEEDS), rounded(metrics))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="the folder that holds vision/; else the variable NESTLING_DATA")
    parser.add_argument("--tasks", nargs="+", choices=tuple(RATES), default=list(RATES))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(report(options.tasks, options.data))


if __name__ == "__main__":
    main()
