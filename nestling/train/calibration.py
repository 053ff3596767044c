"""What old text looks like from inside a model: the statistics that keep later writes away from it."""

from __future__ import annotations

from typing import Any

import torch

from nestling.data import TokenStream

BATCHES = 8
TOKENS = 1 << 17  # of one batch, whatever the rows of a step


def calibrate(model: Any, stream: TokenStream, *, device: torch.device, batches: int = BATCHES) -> None:
    """Let a model that has old-key statistics take their mean over `batches` batches of its training text.

    The text is read from the beginning of a stream of its own, so that a resumed run takes
    the same, and so does every rank.
    """
    if not hasattr(model, "calibrate"):
        return
    rows = max(1, min(stream.rows, TOKENS // stream.length))
    text = TokenStream(stream.tokens, rows=rows, length=stream.length, seed=stream.seed + 1)
    for seen in range(batches):
        model.calibrate(next(text).inputs.to(device), keep=seen / (seen + 1))
