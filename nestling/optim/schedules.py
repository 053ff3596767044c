"""Schedules: what a hyper-parameter is multiplied by, as a function of the step (0, 1, ...).

torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, 2_000))           as a scheduler of torch, or
scale(optimizer, step, lr=warmup_cosine(100, 2_000), weight_decay=linear(2_000))  without any state, before a step
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Schedule = Callable[[int], float]


def warmup_cosine(warmup: int, steps: int, final: float = 0.1) -> Schedule:
    """From 1/warmup to 1 in `warmup` steps, then along a cosine to `final` at the last of `steps`, which stays."""
    check(warmup, steps)
    return lambda step: (
        rising(step, warmup) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part(step, warmup, steps))))
    )


def warmup_stable_decay(warmup: int, steps: int, decay: int, final: float = 0.0) -> Schedule:
    """From 1/warmup to 1 in `warmup` steps, constant, and a straight line to `final` over the last `decay` steps."""
    check(warmup, steps)
    if not 0 < decay <= steps - warmup:
        raise ValueError(f"decay is {decay}; use 1 ... {steps - warmup} of the steps after the warm-up")
    return lambda step: rising(step, warmup) * (1 - (1 - final) * part(step, steps - decay, steps))


def linear(steps: int, final: float = 0.0) -> Schedule:
    """A straight line from 1 to `final` at the last of `steps`, which stays."""
    return warmup_stable_decay(0, steps, steps, final)


def scale(optimizer: torch.optim.Optimizer, step: int, **schedules: Schedule) -> None:
    """Set hyper-parameters of every group to what they were made with times their schedule.

    The original value is kept in the group as initial_<name>, as the schedulers of torch do.
    """
    for group in optimizer.param_groups:
        for name, schedule in schedules.items():
            if name not in group:
                raise ValueError(f"{name!r} is no hyper-parameter of {type(optimizer).__name__}: {', '.join(group)}")
            group[name] = group.setdefault(f"initial_{name}", group[name]) * schedule(step)


def rising(step: int, warmup: int) -> float:
    """1/warmup at step 0, 1 at the last step of the warm-up and ever after."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def part(step: int, start: int, steps: int) -> float:
    """How much of the way from step `start` to the last of `steps` is done."""
    return min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))


def check(warmup: int, steps: int) -> None:
    """Raise ValueError unless the warm-up fits."""
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup is {warmup}, steps is {steps}; use 0 <= warmup < steps")
