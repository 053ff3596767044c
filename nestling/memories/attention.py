"""Softmax attention as a memory: non-parametric, re-solved at every token, its cache is its state (eqs. 62, 63)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.level import Level
from .attention_cache import AttentionState, OpenCache
from .projections import rotary, rotate


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, full or over a sliding window.

    Args:
        dim: width of the stream. heads: number of heads; dim must be a multiple of it.
        window: a query sees itself and the window - 1 tokens before it; None = all of them.
        rotary_base: base of the rotary frequencies.
    """

    def __init__(self, dim: int, heads: int, *, window: int | None = None, rotary_base: float = 10_000.0) -> None:
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
        self.rotary_base = rotary_base

    def forward(
        self, x: Tensor, state: AttentionState | OpenCache | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | OpenCache]:
        """x (B, T, D) -> y (B, T, D) and the cache after it.

        An `OpenCache` is for one token per call: it is written in place, with fixed shapes and without waiting for the
        device.
        """
        rows, tokens, _ = x.shape
        start = torch.zeros(rows, dtype=torch.long, device=x.device) if state is None else state.position
        positions = start[:, None] + torch.arange(tokens, device=x.device)
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, self.width).unbind(2)
        cos, sin = rotary(positions, self.width, x.dtype, self.rotary_base)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(state, OpenCache):
            if tokens != 1:
                raise ValueError(
                    f"x has {tokens} tokens, an open cache takes one per call; use state.closed() for more"
                )
            o = state.attend(*(part.transpose(1, 2) for part in (q, k, v)))
            return self.out(o.transpose(1, 2).flatten(2)), state.moved(lengths)
        real = None if lengths is None else torch.arange(tokens, device=x.device) < lengths[:, None]
        slot = positions + 1 if real is None else (positions + 1) * real
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
            slot = torch.cat([state.slot, slot], 1)
        o = self._attend(q, k, v, slot, positions, plain=state is None)
        k, v, slot = self._kept(k, v, slot, compact=state is not None or lengths is not None)
        y = self.out(o.flatten(2))
        return y, AttentionState(k, v, slot, start + (tokens if lengths is None else lengths), self.window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, positions: Tensor, *, plain: bool) -> Tensor:
        """o (B, T, H, d). `plain`: no cache, so that keys stand where their queries do."""
        tokens, slots = q.shape[1], k.shape[1]
        if plain and (self.window is None or tokens <= self.window):
            parts = [_sdpa(q, k, v, None)]
            return parts[0]
        block = tokens if self.window is None else self.window
        cached, parts = slots - tokens, []
        for a in range(0, tokens, block):
            b = min(a + block, tokens)
            first = 0 if self.window is None or a < self.window else cached + a - self.window + 1
            seen = self._mask(slot[:, first : cached + b], positions[:, a:b])
            parts.append(_sdpa(q[:, a:b], k[:, first : cached + b], v[:, first : cached + b], seen))
        return torch.cat(parts, 1)

    def _mask(self, slot: Tensor, positions: Tensor) -> Tensor:
        """(B, 1, T, S) bool: which keys a query sees. A padded query sees everything, so that nothing becomes NaN."""
        age = positions[:, :, None] + 1 - slot[:, None, :]
        seen = (slot[:, None, :] > 0) & (age >= 0)
        if self.window is not None:
            seen = seen & (age < self.window)
        return (seen | ~seen.any(-1, keepdim=True)).unsqueeze(1)

    def _kept(self, k: Tensor, v: Tensor, slot: Tensor, *, compact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The cache that later queries can need, left-aligned per row."""
        limit = slot.shape[1] if self.window is None else self.window - 1
        if not compact or bool((slot > 0).all()):
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
