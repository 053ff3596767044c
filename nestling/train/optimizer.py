"""The optimizer of a config, its rate over the steps, and its state as a tree for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nestling.optim import DGD, M3, Muon, param_groups
from nestling.train.config import OptimConfig

Part = Callable[[Tensor, Tensor], Tensor]
MATRICES = "hidden matrices"  # the level of `param_groups` that they are
HIDDEN: dict[str, Callable[..., torch.optim.Optimizer]] = {"muon": Muon, "m3": M3}


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay, vectors and scalars do not; hidden matrices may have another optimizer."""
    betas = (config.beta1, config.beta2)
    if config.matrices != "adamw":
        matrices = HIDDEN.get(config.matrices) or delta_descent(model, config)
        decay, dtype = config.weight_decay, config.ns_dtype or None
        made = param_groups(model, config.lr, matrices=matrices, weight_decay=decay, ns_dtype=dtype)
        for group in made.optimizers["the rest"].param_groups:
            group |= {"betas": betas, "eps": config.eps}
        return made
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps)


def delta_descent(model: nn.Module, config: OptimConfig) -> Callable[..., DGD]:
    """What makes DGD of some matrices of a model. They fade per step as they would under AdamW."""

    def make(named: list[tuple[str, Tensor]], *, weight_decay: float, **_: Any) -> DGD:
        fading = weight_decay * config.lr / config.matrices_rate
        return DGD(model, config.matrices_rate, weight_decay=fading, erase=config.erase, only=named)

    return make


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 1 ... steps: linear to `lr` over the warm-up, then a cosine to `final_lr * lr`, which stays."""
    last = config.decay_steps or steps
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    after = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * after)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float, config: OptimConfig) -> None:
    """Give all groups the rate, hidden matrices that part of their own."""
    for group in optimizer.param_groups:
        own = config.matrices_rate / config.lr if group.get("level") == MATRICES else 1
        group["lr"] = rate * own


def optimizer_tree(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict` with names for keys."""
    saved = optimizer.state_dict()
    return {"state": {str(i): s for i, s in saved["state"].items()}, "groups": saved["param_groups"]}


def load_optimizer_tree(
    optimizer: torch.optim.Optimizer, tree: dict[str, Any], part: Part = lambda made, p: made
) -> None:
    """Put the tree of `optimizer_tree` back; `part` makes of what was kept for all of p what is kept for p here."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        int(i): {key: _as(value, held[int(i)], part) for key, value in s.items()} for i, s in tree["state"].items()
    }
    groups = with_tuples(tree["groups"], optimizer.param_groups)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def with_tuples(groups: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved param groups, whose JSON has lists where the groups of an optimizer have tuples."""
    return [
        {name: tuple(value) if isinstance(mine.get(name), tuple) else value for name, value in saved.items()}
        for saved, mine in zip(groups, now, strict=True)
    ]


def _as(value: Any, p: Tensor, part: Part) -> Any:
    """What is kept for p, with the shape of p, spread as p is."""
    return part(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value
