"""Calibration: what training text looks like to a level, so that later writes fit the model and spare what it knows.

Two statistics of training text are kept in buffers: the covariance of the inputs of every map (the old keys, which
the metric turns writes away from), and the usual length of a gradient compared with the weights, which makes one
rate mean the same in every model: at rate r, a segment as surprising as training text moves the weights by r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .level import ContinuumLevel
from .linear import Reading


def calibrate(levels: dict[str, ContinuumLevel], now: Reading, loss: Tensor, *, tokens: int, keep: float) -> None:
    """Fold a recorded piece of training text into the statistics of its levels.

    Args:
        now, loss: the reading in which `loss`, the sum of all token losses, was computed.
        tokens: predicted tokens per row behind `loss`.
        keep: in [0, 1), the part of earlier statistics that stays.
    """
    kappas = {m: level.rule.kappa for level in levels.values() for m in level.maps.values()}
    uses = [(m, trace) for m in kappas for trace in (now.tape or {}).get(m, ())]
    with torch.autocast(loss.device.type, enabled=False):
        grads = torch.autograd.grad(loss, [trace.wanted for _, trace in uses])
    with torch.no_grad():
        squares, sizes = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for (m, trace), grad in zip(uses, grads, strict=True):
            keys = trace.x.to(m.weight.dtype)
            norms = m.over_parts(trace.gradient(grad, keys).norm())
            squares += (norms / tokens).square().mean().cpu()
            sizes += m.length().square().cpu()
            flat = keys.flatten(0, 1)
            m.remember(flat.T @ flat / len(flat), kappa=kappas[m], keep=keep)
        unit = (sizes / squares.clamp_min(1e-30)).sqrt()
        for level in levels.values():
            fresh = not bool(level.inner_unit > 0)
            level.inner_unit.lerp_(unit.to(level.inner_unit), 1.0 if fresh else 1.0 - keep)
