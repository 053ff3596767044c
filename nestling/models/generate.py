"""Generation: sample one token at a time from a model and its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..memories.continuum import continuum_levels

if TYPE_CHECKING:
    from .reading_model import ReadingModel
    from .state import State

_ROOM = 1_024  # tokens that caches are opened for at most, before it is known whether so many will come


class Decodes(Protocol):
    """Continues the sequences of a state token by token."""

    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Read one token per (active) row, tokens (B,), and return the logits (B, V) of the next."""
        ...

    @property
    def state(self) -> State:
        """The state after all tokens so far."""
        ...


class Generation:
    """An iterator over sampled tokens (B,); afterwards `.state` is the state after all of them.

    Args:
        model, tokens (B, T), max_new_tokens, state: what continues what.
        temperature: 0 = greedy. top_k, top_p: keep the k likeliest tokens, or the fewest with mass p.
        eos: id after which a row only repeats it and reads nothing more; the loop ends when all rows have.
        generator: source of randomness.
        learn_prompt, learn_output: whether the CMS levels learn from the prompt, and from the model's own words.
    """

    def __init__(
        self,
        model: ReadingModel,
        tokens: Tensor,
        max_new_tokens: int,
        state: State | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
        learn_prompt: bool = True,
        learn_output: bool = False,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be >= 0; 0 is greedy")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must lie in (0, 1], or be None")
        if tokens.shape[1] == 0:
            raise ValueError("generate: the prompt is empty; give at least one token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be >= 0")
        self.model, self.tokens, self.count = model, tokens, max_new_tokens
        self._state = state
        self._decoder: Decodes | None = None
        self.temperature, self.top_k, self.top_p, self.eos, self.generator = temperature, top_k, top_p, eos, generator
        self.learn_prompt, self.learn_output = learn_prompt, learn_output
        self._steps = self._run()

    def __iter__(self) -> Iterator[Tensor]:
        return self._steps

    def all(self) -> Tensor:
        """All (remaining) sampled tokens at once, (B, n)."""
        made = list(self._steps)
        return torch.stack(made, 1) if made else self.tokens[:, :0]

    @property
    def state(self) -> State | None:
        """The state after the prompt and the tokens so far; before the first token, the one it was given."""
        return self._state if self._decoder is None else self._decoder.state

    def _run(self) -> Iterator[Tensor]:
        with torch.no_grad():
            out = self.model(self.tokens, self._state, learn=self.learn_prompt)
        learns = self.learn_output and bool(continuum_levels(self.model))
        self._decoder = self.model.decoder(out.state, room=min(self.count, _ROOM), learn=learns)
        logits = out.logits[:, -1]
        active = None if self.eos is None else torch.ones_like(self.tokens[:, 0], dtype=torch.bool)
        for _ in range(self.count):
            token = self.sample(logits)
            if active is not None and self.eos is not None:
                token = token.masked_fill(~active, self.eos)
            logits = self._decoder.step(token, active)
            yield token
            if active is not None:
                active = active & (token != self.eos)
                if not bool(active.any()):
                    return

    def sample(self, logits: Tensor) -> Tensor:
        """One token (B,) from logits (B, V)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p is not None:
            ordered, index = logits.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.scatter(1, index, ordered.masked_fill(before >= self.top_p, -torch.inf))
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)
