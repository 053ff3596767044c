"""Reading a text with learning on: what is gained on the text, and what is forgotten of the training domain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.evals.perplexity import bits_per_byte, checked
from nestling.evals.protocol import Reads, token_losses
from nestling.models import State


@dataclass(frozen=True, kw_only=True)
class Writes:
    """What the levels had done after `tokens` tokens: relative length of each one's last write, and its count."""

    tokens: int
    norms: dict[str, float]  # by the level's path, mean over rows
    counts: tuple[float, ...]  # writes of each level of the last block, fast to slow, mean over rows


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadResult:
    """A text read once from beginning to end.

    Attributes:
        losses: (B, T - 1) nats; column t is the loss of token t + 1, predicted from all before it.
        writes: one entry per call. state: after the last token. learn: whether CMS levels wrote.
    """

    losses: Tensor
    writes: tuple[Writes, ...]
    state: State
    learn: bool

    def nats(self, start: float = 0.0, end: float = 1.0) -> float:
        """Mean loss per token over the part of the text from `start` to `end`, in fractions of its length."""
        length = self.losses.shape[1]
        return self.losses[:, round(start * length) : round(end * length)].double().mean().item()

    def curve(self, parts: int) -> list[tuple[float, float]]:
        """(token in the middle, mean nats) of equal parts of the text, at most one per token."""
        length = self.losses.shape[1]
        edges = sorted({round(i * length / parts) for i in range(parts + 1)})
        return [
            ((a + b) / 2, self.losses[:, a:b].double().mean().item()) for a, b in zip(edges, edges[1:], strict=False)
        ]

    def to_dict(self, parts: int = 64) -> dict[str, Any]:
        """Numbers for JSON; the losses as the mean of `parts` parts."""
        return {
            "learn": self.learn,
            "tokens": self.losses.shape[1] + 1,
            "nats": self.nats(),
            "nats_second_half": self.nats(0.5),
            "curve": [list(point) for point in self.curve(parts)],
            "writes": [asdict(w) for w in self.writes],
        }


@torch.no_grad()
def read_text(
    model: Reads, tokens: Tensor, *, learn: bool = True, call_size: int = 1024, state: State | None = None
) -> ReadResult:
    """Read a text (B, T) in calls of `call_size` tokens that carry the state; every token but the first is scored.

    Each token is predicted before the model learns from it. `call_size` changes no result, only how often the writes
    are looked at. Raises ValueError for a text of fewer than two tokens.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2 or call_size < 1:
        raise ValueError(f"tokens {tuple(tokens.shape)}, call_size={call_size}: need (B, T) with T >= 2 and calls >= 1")
    losses: list[Tensor] = []
    writes: list[Writes] = []
    for start in range(0, tokens.shape[1], call_size):
        piece = tokens[:, start : start + call_size]
        out = model(piece, state, learn=learn)
        state = out.state
        targets = tokens[:, start + 1 : start + call_size + 1]
        losses.append(token_losses(out.logits[:, : targets.shape[1]], targets))
        writes.append(looked_at(state, start + piece.shape[1]))
    assert state is not None
    return ReadResult(losses=torch.cat(losses, 1), writes=tuple(writes), state=state, learn=learn)


def looked_at(state: State, tokens: int) -> Writes:
    """The writes of a state."""
    return Writes(
        tokens=tokens,
        norms={level: norm.double().mean().item() for level, norm in state.write_norms.items()},
        counts=tuple(state.writes.double().mean(0).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Loss on the training domain without and with what a state has learned, in nats per token."""

    before: float
    after: float
    windows: int
    length: int

    @property
    def percent(self) -> float:
        """How much the loss rose, in percent; negative if it fell."""
        return 100 * (self.after / self.before - 1)


@torch.no_grad()
def domain_loss(model: Reads, windows: Tensor, state: State | None = None, *, rows: int = 16) -> float:
    """Mean nats on windows (n, T + 1), each read alone with the fast weights of a state of one row, all frozen.

    The state's context is cleared before, so that only what was learned counts.
    """
    if state is not None and state.rows != 1:
        raise ValueError(f"the state has {state.rows} rows; choose one with state.select([i])")
    learned = None if state is None else state.reset_context()
    total = 0.0
    for part in checked(windows).split(rows):
        start = None if learned is None else learned.select([0] * len(part))
        logits = model(part[:, :-1], start, learn=False).logits
        total += token_losses(logits, part[:, 1:]).double().sum().item()
    return total / windows[:, 1:].numel()


def forgetting(
    model: Reads, state: State, windows: Tensor, *, before: float | None = None, rows: int = 16
) -> Forgetting:
    """What a state has cost on the training domain; `before` = the loss without it, if that is known already."""
    return Forgetting(
        before=domain_loss(model, windows, rows=rows) if before is None else before,
        after=domain_loss(model, windows, state, rows=rows),
        windows=len(windows),
        length=windows.shape[1] - 1,
    )


def gain_percent(learning: ReadResult, frozen: ReadResult, start: float = 0.5) -> float:
    """By how many percent learning lowers bits per byte over the text from `start` on (default: the second half)."""
    return 100 * (1 - bits_per_byte(learning.nats(start)) / bits_per_byte(frozen.nats(start)))
