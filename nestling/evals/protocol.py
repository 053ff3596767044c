"""What an evaluation asks of a model: read tokens with a state, give logits and the next state. Nothing else."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.models import Output, State


class Reads(Protocol):
    """A language model with a state, ours or another."""

    def __call__(self, tokens: Tensor, state: State | None = None, learn: bool = True) -> Output: ...


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T) losses in nats, at least float32, of logits (B, T, V) and targets (B, T)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.transpose(1, 2), targets, reduction="none")
