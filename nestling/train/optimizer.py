"""AdamW, its rate over the steps, and its state as a tree for a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nestling.train.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay, vectors and scalars do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 1 ... steps: linear to `lr` over the warm-up, then a cosine to `final_lr * lr`, which stays."""
    last = config.decay_steps or steps
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    after = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * after)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tree(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict` with names for keys."""
    saved = optimizer.state_dict()
    return {"state": {str(i): s for i, s in saved["state"].items()}, "groups": saved["param_groups"]}


def load_optimizer_tree(optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> None:
    """Put the tree of `optimizer_tree` back; JSON's lists become the tuples they were."""
    groups = [
        {name: tuple(value) if isinstance(now.get(name), tuple) else value for name, value in saved.items()}
        for saved, now in zip(tree["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": {int(i): s for i, s in tree["state"].items()}, "param_groups": groups})
