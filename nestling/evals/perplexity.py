"""Loss on held-out windows: by position in the window, and of the same tokens after more and more context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.evals.protocol import Reads, token_losses


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean loss over n tokens."""

    nats: float  # per token
    bits_per_byte: float
    n: int


@dataclass(frozen=True, kw_only=True)
class PositionLoss(Loss):
    """Loss of the targets that have between `start` + 1 and `end` tokens before them in their window."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ContextLoss(Loss):
    """Loss of the last tokens of each window when `context` tokens before them are shown."""

    context: int


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Loss of a model on held-out windows; `to_dict` gives what JSON can hold."""

    total: Loss
    by_position: tuple[PositionLoss, ...]
    by_context: tuple[ContextLoss, ...]
    windows: int
    length: int  # input tokens per window
    learn: bool
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return math.exp(self.total.nats)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity}


def bits_per_byte(nats: float, bytes_per_token: float = 1.0) -> float:
    """Nats per token in bits per byte of text."""
    return nats / (math.log(2) * bytes_per_token)


@torch.no_grad()
def window_losses(model: Reads, windows: Tensor, *, learn: bool = False, rows: int = 8) -> Tensor:
    """(n, T) losses in nats of windows (n, T + 1), each read from a fresh state, `rows` at a time."""
    parts = [
        token_losses(model(part[:, :-1], learn=learn).logits, part[:, 1:]) for part in checked(windows).split(rows)
    ]
    return torch.cat(parts)


@torch.no_grad()
def context_losses(model: Reads, windows: Tensor, context: int, scored: int, *, learn: bool, rows: int) -> Tensor:
    """(n, scored) losses of the last `scored` tokens of each window, read after `context` tokens before the first."""
    part = windows[:, windows.shape[1] - scored - context :]
    return window_losses(model, part, learn=learn, rows=rows)[:, -scored:]


def perplexity(
    model: Reads,
    windows: Tensor,
    *,
    learn: bool = False,
    contexts: Sequence[int] = (),
    scored: int = 32,
    buckets: int = 16,
    bytes_per_token: float = 1.0,
    rows: int = 8,
) -> PerplexityResult:
    """Score held-out windows.

    Args:
        windows: (n, T + 1) int64; each is read alone, from a fresh state.
        learn: whether CMS levels write inside a window.
        contexts: context lengths; the same last `scored` tokens of every window are predicted after each of them.
        buckets: number of equal parts of the window in `by_position`.
        bytes_per_token: bytes of text per token, for bits per byte; 1 for the byte tokenizer.
        rows: windows read side by side.
    Raises ValueError if a context does not fit into the windows.
    """
    length = checked(windows).shape[1] - 1
    for context in contexts:
        if not 1 <= context <= length + 1 - scored:
            raise ValueError(f"context={context} with scored={scored} does not fit into windows of {length + 1} tokens")

    def score(losses: Tensor) -> dict[str, Any]:
        nats = losses.double().mean().item()
        return {"nats": nats, "bits_per_byte": bits_per_byte(nats, bytes_per_token), "n": losses.numel()}

    losses = window_losses(model, windows, learn=learn, rows=rows)
    edges = sorted({round(i * length / buckets) for i in range(buckets + 1)})
    return PerplexityResult(
        total=Loss(**score(losses)),
        by_position=tuple(
            PositionLoss(start=a, end=b, **score(losses[:, a:b])) for a, b in zip(edges, edges[1:], strict=False)
        ),
        by_context=tuple(
            ContextLoss(context=c, **score(context_losses(model, windows, c, scored, learn=learn, rows=rows)))
            for c in contexts
        ),
        windows=len(windows),
        length=length,
        learn=learn,
        bytes_per_token=bytes_per_token,
    )


def checked(windows: Tensor) -> Tensor:
    """The windows, if they are a table of at least two columns."""
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows of shape {tuple(windows.shape)} hold no target; give (n, T + 1) tokens with T >= 1")
    return windows
