"""Softmax attention as a memory: non-parametric, re-solved at every token, its cache is its state (eqs. 62, 63)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.level import Level
from ..core.spread import Split
from .attention_cache import AttentionState, OpenCache
from .projections import rotary, rotate


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, full or over a sliding window.

    Args:
        dim: width of the stream. heads: number of heads; dim must be a multiple of it.
        window: a query sees itself and the window - 1 tokens before it; None = all of them.
        persistent: learned tokens without a position that every query sees besides ([Titans] section 3.3).
        rotary_base: base of the rotary frequencies.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int | None = None,
        persistent: int = 0,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise ValueError(
                f"dim={dim} must split into heads={heads} of even width; use e.g. heads={max(1, dim // 64)}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1 token, or None for full attention")
        self.heads, self.window, self.width = heads, window, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        self.rotary_base = rotary_base

    def forward(
        self,
        x: Tensor,
        state: AttentionState | OpenCache | None = None,
        lengths: Tensor | None = None,
        *,
        even: bool | None = None,
    ) -> tuple[Tensor, AttentionState | OpenCache]:
        """x (B, T, D) -> y (B, T, D) and the cache after it.

        even: `is_even(state, lengths)`, where that is known; None = it is asked here.

        An `OpenCache` is for one token per call: it is written in place, with fixed shapes and without waiting for the
        device.
        """
        rows, tokens, _ = x.shape
        start = torch.zeros(rows, dtype=torch.long, device=x.device) if state is None else state.position
        positions = start[:, None] + torch.arange(tokens, device=x.device)
        qkv = self.qkv(x)
        heads = qkv.shape[-1] // (3 * self.width)  # of this part, where ranks split them
        q, k, v = qkv.view(rows, tokens, 3, heads, self.width).unbind(2)
        cos, sin = rotary(positions, self.width, x.dtype, self.rotary_base)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(state, OpenCache):
            if tokens != 1:
                raise ValueError(
                    f"x has {tokens} tokens, an open cache takes one per call; use state.closed() for more"
                )
            o = state.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self._always())
            return self.out(o.transpose(1, 2).flatten(2)), state.moved(lengths)
        real = None if lengths is None else torch.arange(tokens, device=x.device) < lengths[:, None]
        slot = positions + 1 if real is None else (positions + 1) * real
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
            slot = torch.cat([state.slot, slot], 1)
        o = self._attend(q, k, v, slot, positions, plain=state is None)
        k, v, slot = self._kept(k, v, slot, even=self.is_even(state, lengths) if even is None else even)
        y = self.out(o.flatten(2))
        return y, AttentionState(k, v, slot, start + (tokens if lengths is None else lengths), self.window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, positions: Tensor, *, plain: bool) -> Tensor:
        """o (B, T, H, d). `plain`: no cache, so that keys stand where their queries do."""
        tokens, slots = q.shape[1], k.shape[1]
        always = self._always()
        if always is None and plain and (self.window is None or tokens <= self.window):
            return _sdpa(q, k, v, None)
        block = tokens if self.window is None else self.window
        cached = slots - tokens
        parts: list[Tensor] = []
        for a in range(0, tokens, block):
            b = min(a + block, tokens)
            first = 0 if self.window is None or a < self.window else cached + a - self.window + 1
            seen = self._mask(slot[:, first : cached + b], positions[:, a:b])
            keys, values = k[:, first : cached + b], v[:, first : cached + b]
            if always is not None:
                keys, values = _before(always[0], keys), _before(always[1], values)
                seen = F.pad(seen, (always[0].shape[1], 0), value=True)
            parts.append(_sdpa(q[:, a:b], keys, values, seen))
        return torch.cat(parts, 1) if parts else q

    def _always(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values (H, N, d) of the persistent tokens."""
        if self.persistent is None:
            return None
        dim = self.heads * self.width
        k, v = F.linear(self.persistent, self.qkv.weight[dim:]).split(dim, dim=-1)
        return k.unflatten(-1, (self.heads, -1)).transpose(0, 1), v.unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def splits(self, parts: int) -> dict[str, Split]:
        """Every part has its share of the heads. Raises ValueError if they do not divide."""
        if self.persistent is not None:
            return {}
        if self.heads % parts:
            raise ValueError(f"heads={self.heads} do not divide among {parts} ranks; use a multiple of {parts}")
        return {"qkv": Split(0, blocks=3), "out": Split(1)}

    def keys_per_query(self, context: int) -> int:
        """Keys that a query is compared with when `context` tokens were read."""
        return min(context, self.window or context) + (0 if self.persistent is None else len(self.persistent))

    def _mask(self, slot: Tensor, positions: Tensor) -> Tensor:
        """(B, 1, T, S) bool: which keys a query sees. A padded query sees everything, so that nothing becomes NaN."""
        age = positions[:, :, None] + 1 - slot[:, None, :]
        seen = (slot[:, None, :] > 0) & (age >= 0)
        if self.window is not None:
            seen = seen & (age < self.window)
        return (seen | ~seen.any(-1, keepdim=True)).unsqueeze(1)

    def is_even(self, state: AttentionState | OpenCache | None, lengths: Tensor | None) -> bool:
        """Whether all rows have read, and will have, a token in every place of the cache. Asks the device."""
        full = state is None or (isinstance(state, AttentionState) and bool((state.slot > 0).all()))
        return lengths is None and full

    def _kept(self, k: Tensor, v: Tensor, slot: Tensor, *, even: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The cache that later queries can need, left-aligned per row."""
        limit = slot.shape[1] if self.window is None else self.window - 1
        if even:
            cut = max(0, slot.shape[1] - limit)
            return k[:, cut:], v[:, cut:], slot[:, cut:]
        newest = slot.amax(1, keepdim=True)
        alive = slot > (newest - limit if self.window is not None else 0)
        alive = alive & (slot > 0)
        order = torch.argsort((~alive).to(torch.uint8), dim=1, stable=True)[:, : int(alive.sum(1).max())]
        pick = order[:, :, None, None].expand(-1, -1, *k.shape[2:])
        keep = alive.gather(1, order)
        return (
            k.gather(1, pick) * keep[:, :, None, None],
            v.gather(1, pick) * keep[:, :, None, None],
            slot.gather(1, order) * keep,
        )

    def levels(self) -> list[Level]:
        """Attention re-solves its regression at every read: frequency infinity, period 0."""
        slots = None if self.window is None else 4 * 2 * (self.window - 1) * self.heads * self.width + 8 * self.window
        return [
            Level(
                name="attention" if self.window is None else f"attention, window {self.window}",
                memory="softmax attention (non-parametric)",
                objective="weighted L2 regression",
                rule="closed form (Nadaraya-Watson)",
                clock="token",
                period=0,
                parameters=sum(p.numel() for p in self.parameters()),
                half_life=None,
                transfer="direct, non-parametric",
                state_bytes=slots,
            )
        ]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def _before(always: Tensor, x: Tensor) -> Tensor:
    """always (H, N, d) in front of every row of x (B, S, H, d)."""
    return torch.cat([always.transpose(0, 1).expand(len(x), -1, -1, -1).to(x.dtype), x], 1)
