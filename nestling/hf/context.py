"""Context: the attention cache of a pretrained model as a value, for rows of any age.

Rows of equal age are read just as transformers reads them. Where they differ, every row is pushed to the right, its
cache and its new tokens without a gap, which is how transformers pads: so distances between tokens, and with them
sliding windows and rotary positions, stay true. What stands to the left of a row is seen by none of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..core.state import state_class

LAYER_TYPES = {"full_attention", "sliding_attention"}


@state_class
class Context:
    """What a pretrained model still sees.

    Attributes:
        keys, values: by layer, (B, S, H, K) from the left, zero behind a row's length.
        tokens: (B, S) the ids they came from. length: (B,) how many.
    """

    keys: list[Tensor]
    values: list[Tensor]
    tokens: Tensor
    length: Tensor


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one call stand, with every row pushed to the right.

    Attributes:
        before, lengths: (B,) tokens in the cache, and new ones. slots: columns of the cache. new: columns of new ones.
    """

    before: Tensor
    lengths: Tensor
    slots: int
    new: int

    @property
    def total(self) -> Tensor:
        """(B,) tokens of each row, old and new."""
        return self.before + self.lengths

    @property
    def size(self) -> int:
        """Columns of keys that attention sees."""
        return max(int(self.total.max()), self.new)

    def _columns(self, count: int) -> Tensor:
        return torch.arange(count, device=self.before.device)[None]

    def pushed(self, tokens: Tensor) -> Tensor:
        """New tokens (B, n) from the left -> the same from the right; what fills a row up means nothing."""
        return tokens.gather(1, (self._columns(self.new) - self.new + self.lengths[:, None]).clamp_min(0))

    def unpushed(self, logits: Tensor) -> Tensor:
        """Logits (B, n, V) of pushed tokens, from the left again."""
        back = (self._columns(self.new) + self.new - self.lengths[:, None]).clamp_max(self.new - 1)
        return logits.gather(1, back[:, :, None].expand(-1, -1, logits.shape[-1]))

    @property
    def positions(self) -> Tensor:
        """(B, n) the position of each pushed token in its row."""
        return (self._columns(self.new) - self.new + self.total[:, None]).clamp_min(0)

    def keys(self, old_and_new: Tensor) -> Tensor:
        """(B, H, S + n, K), cached from the left and new from the right -> (B, H, size, K) without gaps."""
        own = self._columns(self.size) - self.size + self.total[:, None]  # the how-manieth token of the row
        fresh = own + self.slots + self.new - self.total[:, None]
        at = torch.where(own < self.before[:, None], own, fresh).clamp_min(0)[:, None, :, None]
        heads, width = old_and_new.shape[1], old_and_new.shape[3]
        return old_and_new.gather(2, at.expand(-1, heads, -1, width))

    def kept(self, pushed: Tensor) -> Tensor:
        """(B, H, size, K) -> (B, size, H, K) from the left, zero behind each row."""
        column = self._columns(self.size)
        at = (column + self.size - self.total[:, None]).clamp_max(self.size - 1)
        real = column < self.total[:, None]
        heads, width = pushed.shape[1], pushed.shape[3]
        left = pushed.gather(2, at[:, None, :, None].expand(-1, heads, -1, width)).transpose(1, 2)
        return left * real[:, :, None, None]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, n, size) what to add to the scores: 0 where a query sees a key, the least number elsewhere."""
        query, key = self._columns(self.new)[0][:, None] + self.size - self.new, self._columns(self.size)
        seen = key <= query if window is None else (key <= query) & (key > query - window)
        real = key >= self.size - self.total[:, None]
        hidden = ~(seen[None] & real[:, None, :])
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


class PlacedLayer(DynamicLayer):
    """A layer of a cache whose rows are of different age."""

    def __init__(self, place: Placement, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.place, self.past = place, (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (
            self.place.keys(new if old is None else torch.cat([old, new], 2))
            for old, new in zip(self.past, (key_states, value_states), strict=True)
        )
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.place.size - self.place.new


def open_cache(context: Context | None, layers: int, place: Placement | None) -> Cache:
    """A cache with this content that a pretrained model can go on with; `place` None = rows of equal age."""
    made: list[DynamicLayer] = []
    for i in range(layers):
        past = (None, None) if context is None else (context.keys[i].transpose(1, 2), context.values[i].transpose(1, 2))
        if place is not None:
            made.append(PlacedLayer(place, *past))
            continue
        layer = DynamicLayer()
        if past[0] is not None and past[1] is not None and context is not None:
            length = int(context.length[0])
            layer.lazy_initialization(*past)
            layer.keys, layer.values = past[0][:, :, :length], past[1][:, :, :length]
        made.append(layer)
    return Cache(layers=made)


def closed_cache(cache: Cache, tokens: Tensor, length: Tensor, place: Placement | None) -> Context:
    """The content of a cache as a value."""

    def kept(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if place is None else place.kept(x)

    keys, values = [kept(layer.keys) for layer in cache.layers], [kept(layer.values) for layer in cache.layers]
    return Context(keys, values, tokens, length)


def attention_masks(config: Any, place: Placement, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The masks of a call with rows of different age, in the form that the model family takes."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    windows = {"full_attention": None, "sliding_attention": window}
    masks = {kind: place.mask(windows[kind], dtype) for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))
