"""The cache of attention: as a value that calls hand on, and as a buffer of fixed shape that decoding writes in place.

Reading many tokens makes new values. A token at a time, that would copy the whole cache for each: decoding opens the
value into buffers that only it holds, and closes them into a value again. A window is a ring of exactly that many
places; full attention has room to spare.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.state import replace, state_class


@state_class
class AttentionState:
    """Keys and values seen so far.

    Attributes:
        k, v: (B, S, H, d) in the order they were read; keys are rotated by their absolute position.
        slot: (B, S) position + 1 of each cached key, 0 = empty.
        position: (B,) tokens read.
        window: places that a query sees, itself included; None = all.
    """

    k: Tensor
    v: Tensor
    slot: Tensor
    position: Tensor
    window: int | None = None

    def opened(self, room: int) -> OpenCache:
        """Buffers of one owner with this content, and place for `room` >= 1 more tokens, or for a whole window."""
        size = self.slot.shape[1] + room
        size = size if self.window is None else min(size, self.window)
        rows, _, heads, width = self.k.shape
        at = torch.where(self.slot > 0, (self.slot - 1) % size, size)  # empty entries go behind the end
        at = at[:, None, :, None].expand(-1, heads, -1, width)
        empty = self.k.new_zeros(rows, heads, size + 1, width)
        k, v = (empty.scatter(2, at, x.transpose(1, 2))[:, :, :size].contiguous() for x in (self.k, self.v))
        return OpenCache(k, v, self.position.clone(), self.window)


@state_class
class OpenCache:
    """The same while tokens come one by one: the token at position p stands in place p modulo S.

    Attributes:
        k, v: (B, H, S, d), written in place by their owner's steps; what is not yet read is zero or stale.
        position: (B,) tokens read. window: as in `AttentionState`; S is the window, or more than the tokens read.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    window: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, always: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Write one key and value per row and read with its query: q, k, v (B, H, 1, d) -> o (B, H, 1, d).

        always: keys and values (H, N, d) that every query sees besides.

        A row that does not move its `position` afterwards has read nothing: the next token takes the same place.
        """
        size = self.k.shape[2]
        at = (self.position % size).view(-1, 1, 1, 1).expand_as(k)
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer.scatter_(2, at, new.to(buffer.dtype))
        seen = torch.arange(size, device=q.device) <= self.position[:, None]  # a full ring holds the window and no more
        keys, values = self.k.to(q.dtype), self.v.to(q.dtype)
        if always is not None:
            keys, values = (
                torch.cat([p.to(q.dtype).expand(len(q), -1, -1, -1), x], 2)
                for p, x in zip(always, (keys, values), strict=True)
            )
            seen = F.pad(seen, (always[0].shape[1], 0), value=True)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None, :])

    def moved(self, lengths: Tensor | None) -> OpenCache:
        """After one token, or `lengths` (B,) of 0 or 1, per row."""
        return replace(self, position=self.position + (1 if lengths is None else lengths))

    def opened(self, room: int) -> OpenCache:
        """Buffers with place for `room` more tokens; a ring has it already."""
        return self if self.k.shape[2] == self.window else self.closed().opened(room)

    def closed(self) -> AttentionState:
        """What later queries can need, as a value."""
        size = self.k.shape[2]
        kept = self.position if self.window is None else self.position.clamp(max=self.window - 1)
        place = torch.arange(int(kept.max()) if len(kept) else 0, device=kept.device)
        real = place < kept[:, None]
        slot = ((self.position - kept)[:, None] + place + 1) * real
        at = ((slot - 1).clamp_min(0) % size)[:, None, :, None].expand(-1, self.k.shape[1], -1, self.k.shape[3])
        k, v = ((x.gather(2, at) * real[:, None, :, None]).transpose(1, 2) for x in (self.k, self.v))
        return AttentionState(k.contiguous(), v.contiguous(), slot, self.position.clone(), self.window)
