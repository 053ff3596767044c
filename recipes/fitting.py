"""One way to train a small model: a linear warm-up, clipped gradients; AdamW and a cosine, or what a task needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARMUP, DECAY, BETAS, CLIP, SHOWN = 20, 0.1, (0.9, 0.95), 1.0, 20


def fit(model: nn.Module, loss_at: Callable[[int], Tensor], *, steps: int, lr: float, decay: float = DECAY) -> float:
    """Minimise loss_at(0), loss_at(1) ... in nats, one step each; returns the mean of the last `SHOWN` losses."""
    return minimise(model, loss_at, steps, torch.optim.AdamW(groups(model, decay), lr=lr, betas=BETAS), pace)


def minimise(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    optimizer: torch.optim.Optimizer,
    pace: Callable[[int, int], float],
) -> float:
    """`fit` with another optimizer, at its own rates times `pace(step, steps)`."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    losses = []
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-SHOWN:]
    return sum(last) / len(last)


def groups(model: nn.Module, decay: float = DECAY) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def pace(step: int, steps: int) -> float:
    """Share of the rate: `WARMUP` steps up, and a cosine down to zero."""
    return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * min(1, step / steps))) / 2
