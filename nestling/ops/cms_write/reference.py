"""The write of a factored gradient, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def cms_write(delta: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, keep: float = 1.0) -> Tensor:
    """D <- keep D, then for every token r of row b: D <- D + scale_b left_r right_r^T.

    delta  (B, O, I) what was written before, oriented like nn.Linear.weight
    left   (B, R, O) gradients at the layer's outputs;  right (B, R, I) its inputs, the old-key metric applied
    scale  (B,) minus the rate, over the predicted tokens;  keep = 1 - decay
    Returns the new D; the old one is not changed.
    Source: (71) and the retention of `InnerRule`; docs/levels.md, "The write".
    """
    with torch.autocast(delta.device.type, enabled=False):
        delta = keep * delta
        for r in range(left.shape[1]):
            token = left[:, r, :, None].to(delta) * right[:, r, None, :].to(delta)
            delta = delta + scale.to(delta)[:, None, None] * token
        return delta
