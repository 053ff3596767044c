"""ReadingModel: what a language model does with a state, whatever it is made of: read, score, generate, calibrate.

A model of ours (lm.py) and a pretrained one (nestling/hf) differ in how tokens become a stream and a stream becomes
logits. How they read in segments, write, and hand on a state is the same, and stands here.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.level import Levels
from ..core.spread import local
from ..memories.continuum import FastLinear, Reading, calibrate, continuum_levels, reading
from .company import ALONE, Company
from .generate import Decodes, Generation
from .packing import pack, unpack
from .reader import Reader
from .state import Carried, State

_LOSS_CHUNK = 2**24  # logits held at once in the loss


@dataclass(frozen=True)
class Output:
    """logits (B, T, V), and the state after the tokens."""

    logits: Tensor
    state: State


class ReadingModel(nn.Module, ABC):
    """A language model with a state. Abstract: the finals say how tokens are read between two writes.

    Attributes:
        config: a dataclass with at least `name`, `vocab_size`, `outer` and `bptt` (see `ModelConfig`).
        contexts: number of sequence memories; `body` takes and gives the state of each.
        company: the processes that hold its weights together.
    """

    config: Any
    contexts: int
    company: Company = ALONE

    @abstractmethod
    def body(self, tokens: Tensor, mixers: list[Any], lengths: Tensor | None = None) -> tuple[Tensor, list[Any]]:
        """Tokens (B, T) -> stream (B, T, D) and the states of the sequence memories, in the reading around it.

        Of row b the first `lengths[b]` tokens are real; None = all.
        """

    @abstractmethod
    def to_logits(self, hidden: Tensor) -> Tensor:
        """The stream (..., D) -> logits (..., V)."""

    @abstractmethod
    def decoder(self, state: State, *, room: int, learn: bool) -> Decodes:
        """What continues a state token by token; `room` tokens may come."""

    @abstractmethod
    def levels(self) -> Levels:
        """The boxes of this model, fast to slow; their state bytes together bound the state of one sequence."""

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        learn: bool = True,
        mask: Tensor | None = None,
        new_document: Tensor | None = None,
    ) -> Output:
        """Read tokens and, with `learn`, let the CMS levels write what they learn from them.

        Args:
            tokens: (B, T) int64.
            state: from an earlier call; any split of a sequence into calls gives the same logits and final state.
            learn: False freezes the token-clock CMS levels: neither clocks nor buffers move.
            mask: (B, T) bool, False = not written, not counted, not a position; its logits are zero.
            new_document: (B, T) bool, True at a document's first token.
        Returns logits (B, T, V) and the state, detached. Writes also happen under no_grad and inference_mode.
        Raises ValueError for token ids outside the vocabulary, wrong shapes, or a state of another model.
        """
        with _recordable():
            text, place = pack(tokens.clone(), None, mask, new_document, self.config.vocab_size)
            reader = Reader(self, text, learn=learn, logits=True, score=False)
            carried = reader.run(self._tree(state, len(tokens)))
            logits = torch.cat(reader.logits, 1) if reader.logits else self._no_logits(tokens)
            return Output(unpack(logits, place), State(carried, self))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        state: State | None = None,
        new_document: Tensor | None = None,
        *,
        learn: bool = True,
    ) -> tuple[Tensor, State]:
        """Mean next-token loss in nats, with writes on: the training entry. One `loss.backward()` follows.

        The parameter gradients are those of the cross-entropy of `forward(tokens, learn=True).logits`; with
        `outer="segment"` they are taken segment by segment in the same backward pass that the levels learn from.

        Args:
            tokens: (B, T). targets: (B, T), the token after each (negative = none); None = the next token of the row.
            mask, state, new_document, learn: as in `forward`.
        """
        with _recordable():
            text, _ = pack(tokens.clone(), targets, mask, new_document, self.config.vocab_size)
            wanted = [p for p in self.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
            immediate = wanted if self.config.outer == "segment" else []
            reader = Reader(self, text, learn=learn, logits=False, score=True, parameters=immediate)
            carried = reader.run(self._tree(state, len(tokens)))
            count = int((text.targets >= 0).sum())
            if count == 0:
                raise ValueError("loss: no position has a target; give at least two tokens, or targets")
            if reader.loss is not None:
                return reader.loss / count, State(carried, self)
            value = (reader.value / count).to(self.dtype)
            if immediate:
                grads = [None if g is None else g / count for g in reader.gradients]
                value = _Precomputed.apply(value, grads, *immediate)
            return value, State(carried, self)

    def _no_logits(self, tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens), 0, self.config.vocab_size, dtype=self.dtype, device=tokens.device)

    def _tree(self, state: State | None, rows: int) -> Carried | None:
        if state is None:
            return None
        if state.rows != rows:
            raise ValueError(f"state has {state.rows} rows, tokens have {rows}; use state.select(rows) or State.stack")
        if state.model is not self:
            theirs, mine = state.owner(), self.fingerprint()
            if theirs != mine:
                raise ValueError(
                    f"the state belongs to model {theirs}, this is model {mine}; read with the model that wrote it"
                )
        return state.tree

    def loss_of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over tokens of the cross-entropy, in at least float32; negative targets count nothing."""
        wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        goal = targets.flatten().clamp_min(-1)
        return local(F.cross_entropy(wide, goal, ignore_index=-1, reduction="sum"))

    def token_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The same from the normed stream (B, T, D), chunk by chunk so that few logits exist at once."""
        size = max(1, _LOSS_CHUNK // self.config.vocab_size)
        flat, goal = hidden.flatten(0, -2), targets.flatten()
        if len(flat) <= size:
            return self.loss_of_logits(self.to_logits(flat), goal)
        parts = [
            checkpoint(lambda h, t: self.loss_of_logits(self.to_logits(h), t), h, t, use_reentrant=False)
            for h, t in zip(flat.split(size), goal.split(size), strict=True)
        ]
        return torch.stack(parts).sum()

    def generate(self, tokens: Tensor, max_new_tokens: int, state: State | None = None, **options: Any) -> Generation:
        """Continue tokens (B, T): iterate for tokens (B,), or `.all()` for (B, n). Options: see `Generation`."""
        return Generation(self, tokens, max_new_tokens, state, **options)

    def calibrate(self, tokens: Tensor, *, keep: float = 0.9) -> None:
        """Fold training text (B, T) into the statistics that CMS writes go by: old keys and usual gradients.

        Only buffers with `inner` in their name change. `keep` in [0, 1) is the part of earlier statistics that stays.
        """
        levels = continuum_levels(self)
        if not levels:
            return
        with torch.inference_mode(False), torch.enable_grad(), reading(Reading({}, {}, {})) as now:
            text, _ = pack(tokens.clone(), None, None, None, self.config.vocab_size)
            hidden, _ = self.body(text.tokens, [None] * self.contexts)
            loss = self.token_loss(hidden, text.targets)
        calibrate(levels, now, loss, tokens=tokens.shape[1] - 1, keep=keep)

    def written_maps(self) -> list[FastLinear]:
        """The linear maps that levels write."""
        return [m for level in continuum_levels(self).values() for m in level.maps.values()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def fingerprint(self) -> str:
        """Name, and a hash over config and weights: what a saved state is bound to."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return f"{self.config.name}-{digest.hexdigest()[:16]}"


@contextmanager
def _recordable() -> Iterator[None]:
    """Leave inference mode, in which no write could take its gradient, but keep the caller's grad mode."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients are known already: backward hands them to the parameters."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if g is None else g * outer for g in ctx.grads))
