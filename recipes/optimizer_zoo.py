"""The optimizers that the recipes compare: how each is built over a model at a rate, and the rates it is swept over.

    optimizer = ZOO["Muon"].make(model, 3e-3)
    for rate in ZOO["Muon"].rates: ...

Muon and M3 get the hidden matrices and leave embeddings, heads and vectors to AdamW, at one rate in AdamW's units
(`nestling.optim.param_groups`), so the three share a grid. The element-wise ones write everything, and DGD takes the
module. Every optimizer has the same number of rates, a geometric grid around its default. Weight decay is done by
`fade` and not by the optimizers: the same share of every matrix per step, whatever the optimizer and its rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nestling import optim

FACTOR = 3.0  # between neighbouring rates
FADE = 1e-4  # of a matrix per step at the full rate: AdamW's lr 1e-3 times weight decay 0.1
Make = Callable[[nn.Module, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Entry:
    """An optimizer: how to build it over a model at a rate, and its default rate in these recipes."""

    make: Make
    default: float

    @property
    def rates(self) -> tuple[float, ...]:
        return self.default / FACTOR, self.default, self.default * FACTOR


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return optim.param_groups(model, lr, weight_decay=0.0)


def m3(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return optim.param_groups(model, lr, matrices=optim.M3, weight_decay=0.0)


def m3_fast(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """M3 without its slow memory."""
    return optim.param_groups(model, lr, matrices=optim.M3, weight_decay=0.0, slow=())


ZOO: dict[str, Entry] = {
    "AdamW": Entry(adamw, 3e-3),
    "SGD-momentum": Entry(lambda model, lr: optim.Momentum(model.parameters(), lr), 0.1),
    "Muon": Entry(muon, 3e-3),
    "M3": Entry(m3, 3e-3),
    "M3, no slow memory": Entry(m3_fast, 3e-3),
    "DeltaMomentum": Entry(lambda model, lr: optim.DeltaMomentum(model.parameters(), lr), 0.1),
    "DMGD": Entry(lambda model, lr: optim.DeepMomentum(model.parameters(), lr), 0.3),
    "DGD": Entry(lambda model, lr: optim.DGD(model, lr, erase=0.01), 0.3),
}


def m3_long(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """M3 whose slow memory reaches back as far as the paper's from the first step on."""
    return optim.param_groups(model, lr, matrices=optim.M3, weight_decay=0.0, horizon=None)


LONG_MEMORY = {**ZOO, "M3": Entry(m3_long, ZOO["M3"].default)}  # where memory of the past is what is asked for


@torch.no_grad()
def fade(model: nn.Module, share: float) -> None:
    """Weight decay: every parameter with two dimensions or more loses this share of itself; vectors do not."""
    torch._foreach_mul_([p for p in model.parameters() if p.dim() > 1], 1 - share)
