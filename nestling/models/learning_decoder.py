"""LearningDecoder: decoding while the levels learn from what is decoded, at constant cost.

Between two writes all weights are constant, so tokens are decoded one by one with nothing to learn. The token that
closes a segment is read together with those before it, in parallel: their one pass is what the levels learn from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..memories.continuum import continuum_levels, tokens_to_write
from .decoder import Decoder
from .state import State

if TYPE_CHECKING:
    from .lm import LanguageModel


class LearningDecoder:
    """Gives the logits and the state of `model(tokens[:, None], state, learn=True)`, for rows of any age.

    Args:
        model: a LanguageModel. state: what its sequences have read; it is not changed.
        room: tokens to make place for at once, as in `Decoder`.
    Raises ValueError for a model without levels that write.
    """

    def __init__(self, model: LanguageModel, state: State, *, room: int) -> None:
        self.model, self.room = model, room
        self._begin(state)

    def _begin(self, state: State) -> None:
        self.learned, self.waiting = state, list[tuple[Tensor, Tensor]]()
        self.decoder, self.steps = Decoder(self.model, state, room=self.room), 0
        self.limits = _tokens_to_close(self.model, state)
        self.least = int(self.limits.min())

    @torch.no_grad()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Read one token per row, tokens (B,), and return the logits (B, V) of the next.

        Rows whose `active` (B,) is False read nothing: their state stays, their logits mean nothing.
        """
        reads = torch.ones_like(tokens, dtype=torch.bool) if active is None else active
        self.waiting.append((tokens, reads))
        if self.steps >= self.least and bool((reads & (self.decoder.count >= self.limits)).any()):
            logits, state = self._learn()
            self._begin(state)
            return logits
        self.steps += 1
        return self.decoder.step(tokens, active)

    @property
    def state(self) -> State:
        """The state after all tokens so far, as a value."""
        if self.waiting:
            self.learned = self._learn()[1]
            self.waiting = []
        return self.learned

    def _learn(self) -> tuple[Tensor, State]:
        """Read what was decoded since; the logits (B, V) of the last step and the state after it."""
        tokens, reads = (torch.stack(parts, 1) for parts in zip(*self.waiting, strict=True))
        with torch.no_grad():
            out = self.model(tokens, self.learned, learn=True, mask=reads)
        return out.logits[:, -1], out.state


def _tokens_to_close(model: LanguageModel, state: State) -> Tensor:
    """(B,) tokens that each row may read before the one that closes its open segment."""
    segment = state.tree.segment
    waits = tokens_to_write(continuum_levels(model), state.tree.fast)
    if waits is None:
        raise ValueError(f"LearningDecoder: model {model.config.name!r} has no level that writes; use Decoder")
    return waits if segment is None else (waits - segment.length).masked_fill(segment.sealed & (segment.length > 0), 0)
