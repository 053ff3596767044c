"""The write of a factored gradient as one matrix product that adds to what was written before (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def cms_write(delta: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, keep: float = 1.0) -> Tensor:
    """The same numbers as reference.cms_write; arguments and result as there."""
    with torch.autocast(delta.device.type, enabled=False):
        scaled = left.to(delta) * scale.to(delta)[:, None, None]
        return torch.baddbmm(delta, scaled.mT, right.to(delta), beta=keep)
