"""PretrainedReader: a converted Hugging Face model that reads with a state, as the models of this library do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.level import Level, Levels
from ..core.state import pad_right, where_rows
from ..memories.continuum import ContinuumLevel, continuum_levels, untaped
from ..models import ReadingModel, State
from ..models.config import check_outer
from .context import Context, Placement, attention_masks, closed_cache, open_cache


@dataclass(frozen=True)
class PretrainedShape:
    """What a state depends on besides the weights.

    Attributes:
        name: the model family. vocab_size: ids it has an embedding for.
        context: tokens of context at most; a longer text goes on from the last half of it.
        levels: the periods, rates and rule of its levels, as its config has them.
        outer, bptt: how far the outer gradient reaches, see `ModelConfig`.
    """

    name: str
    vocab_size: int
    context: int
    levels: dict[str, Any]
    outer: str = "segment"
    bptt: int = 0

    def __post_init__(self) -> None:
        check_outer(self.outer, self.bptt)


class PretrainedReader(ReadingModel):
    """A pretrained causal language model, some of whose MLPs are continuum levels.

    When a row's context is full, it starts again from its last half, read anew with the weights of the time (and from
    the begin-of-text token, if the row started with one): so a text may be as long as it likes.

    Args:
        pretrained: the model. shape: see `PretrainedShape`.
    """

    contexts = 1

    def __init__(self, pretrained: PreTrainedModel, shape: PretrainedShape) -> None:
        super().__init__()
        self.pretrained, self.config = pretrained, shape
        names = inspect.signature(pretrained.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24

    # --- reading ----------------------------------------------------------------------------------------------

    def body(self, tokens: Tensor, mixers: list[Any], lengths: Tensor | None = None) -> tuple[Tensor, list[Any]]:
        """Tokens (B, T) -> logits (B, T, V) and the context, in the reading around it."""
        context: Context | None = mixers[0]
        logits, column, end = [], 0, tokens.shape[1]
        while column < end:
            active = torch.ones_like(tokens[:, 0], dtype=torch.bool) if lengths is None else lengths > column
            context = self._with_room(context, active)
            used = torch.zeros_like(tokens[:, 0]) if context is None else context.length
            size = min(end - column, self.config.context - int(used[active].max()))
            left = None if lengths is None else (lengths - column).clamp(0, size)
            part, context = self._extended(tokens[:, column : column + size], context, left)
            logits.append(part)
            column += size
        return torch.cat(logits, 1), [context]

    def _with_room(self, context: Context | None, active: Tensor) -> Context | None:
        """Rows whose context is full start again from the last half of it."""
        if context is None:
            return None
        full = active & (context.length >= self.config.context)
        if not bool(full.any()):
            return context
        keep = self.config.context // 2
        half = context.tokens[:, self.config.context - keep : self.config.context]
        begin = self.pretrained.config.get_text_config().bos_token_id
        if begin is not None:
            first = torch.where(context.tokens[:, :1] == begin, context.tokens[:, :1], half[:, :1])
            half = torch.cat([first, half[:, 1:]], 1)
        with torch.no_grad(), untaped():
            if bool(full.all()):
                return self._extended(half, None, None)[1]
            return self._extended(half, where_rows(full, None, context), full * keep)[1]

    def _extended(self, tokens: Tensor, context: Context | None, lengths: Tensor | None) -> tuple[Tensor, Context]:
        """Read tokens that the context has room for."""
        rows, new = tokens.shape
        before = torch.zeros(rows, dtype=torch.long, device=tokens.device) if context is None else context.length
        count = torch.full_like(before, new) if lengths is None else lengths
        slots = 0 if context is None else context.tokens.shape[1]
        even = bool((before == before[0]).all()) and (lengths is None or bool((lengths == new).all()))
        place = None if even else Placement(before, count, slots, new)
        cache = open_cache(context, self.pretrained.config.get_text_config().num_hidden_layers, place)
        inputs: dict[str, Any]
        if place is None:
            positions = before[:, None] + torch.arange(new, device=tokens.device)
            inputs = {"input_ids": tokens, "position_ids": positions}
        else:
            masks = attention_masks(self.pretrained.config.get_text_config(), place, self.dtype)
            inputs = {"input_ids": place.pushed(tokens), "position_ids": place.positions, "attention_mask": masks}
        out = self.pretrained(**inputs, **{self.cache_name: cache}, use_cache=True)
        seen = _appended(None if context is None else context.tokens, before, tokens, count)
        logits = out.logits if place is None else place.unpushed(out.logits)
        return logits, closed_cache(cache, seen, before + count, place)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """The stream is logits already: heads differ between families (caps, scales)."""
        return hidden

    def decoder(self, state: State, *, room: int, learn: bool) -> StepwiseDecoder:
        """What continues a state token by token."""
        return StepwiseDecoder(self, state, learn=learn)

    def calibrate(self, tokens: Tensor, *, keep: float = 0.9) -> None:
        """As `ReadingModel.calibrate`; the statistics of old keys, two (I, I) matrices per map, are made when needed.

        Raises ValueError for text of fewer than two tokens.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(f"calibrate: tokens {tuple(tokens.shape)} must be (B, T) with T >= 2")
        for level in continuum_levels(self).values():
            for m in level.maps.values():
                if level.rule.kappa and m.inner_keys is None:
                    m.keep_old_keys()
        super().calibrate(tokens, keep=keep)

    # --- describing -------------------------------------------------------------------------------------------

    def levels(self) -> Levels:
        """The boxes of this model; the levels of MLPs by their layer, and attention, whose context is bounded."""
        boxes = [*self._attention(), *self._continuum()]
        return Levels(boxes)

    def _continuum(self) -> Iterator[Level]:
        levels = {path: m for path, m in self.named_modules() if isinstance(m, ContinuumLevel)}
        finite = [level.period for level in levels.values() if math.isfinite(level.period)]
        segment = 16 * int(min(finite)) + 32 if finite else 0
        for i, (path, level) in enumerate(levels.items()):
            (box,) = level.levels()
            extra = segment if i == 0 else 0
            name = f"{path.removeprefix('pretrained.')}: {box.name}"
            yield replace(box, name=name, state_bytes=(box.state_bytes or 0) + extra)

    def _attention(self) -> Iterator[Level]:
        config = self.pretrained.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        copies = 2 if continuum_levels(self) else 1  # also as the open segment began
        size = copies * self.config.context * (2 * heads * width * self.dtype.itemsize)
        for i, (path, m) in enumerate(attention_of(self.pretrained)):
            yield Level(
                name=f"{path}: attention, context {self.config.context}",
                memory="softmax attention (non-parametric)",
                objective="weighted L2 regression",
                rule="closed form (Nadaraya-Watson)",
                clock="token",
                period=0,
                parameters=sum(p.numel() for p in m.parameters()),
                transfer="direct, non-parametric",
                state_bytes=size + (copies * (8 * self.config.context + 8) if i == 0 else 0),
            )


class StepwiseDecoder:
    """Continues a state through `model(...)`, one token per call."""

    def __init__(self, model: ReadingModel, state: State, *, learn: bool) -> None:
        self.model, self.state, self.learn = model, state, learn

    @torch.no_grad()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Read one token per (active) row, tokens (B,), and return the logits (B, V) of the next."""
        mask = None if active is None else active[:, None]
        out = self.model(tokens[:, None], self.state, learn=self.learn, mask=mask)
        self.state = out.state
        return out.logits[:, -1]


def attention_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention of every layer, by its path; attention inside attention counts once."""
    last = ""
    for path, m in model.named_modules():
        if type(m).__name__.endswith("Attention") and not (last and path.startswith(f"{last}.")):
            last = path
            yield path, m


def _appended(old: Tensor | None, before: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """Ids (B, n) behind the `before` (B,) ids of each row; zero behind its end."""
    size = int((before + count).max())
    column = torch.arange(size, device=new.device)[None]
    have = new.new_zeros(len(new), size) if old is None else pad_right(old, max(size, old.shape[1]))[:, :size]
    fresh = new.gather(1, (column - before[:, None]).clamp(0, new.shape[1] - 1))
    made = torch.where(column < before[:, None], have, fresh)
    return made * (column < (before + count)[:, None])
