"""Titans with memory as context (MAC): what the memory recalls is attended to beside the text, [Titans] section 4.1.

Attention is full and stays inside a segment; across segments only the memory reaches. A segment's recall comes from
the memory as the segment began, and the memory learns what attention made of the segment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.chunked import KeyValueMemory, KeyValueState
from nestling.memories.frame import Frame, check_width, memory_dtype, static_level
from nestling.memories.projections import merge_heads, rotary, rotate, split_heads, unit_norm


@state_class
class SegmentState:
    """Keys and values of the open segment; place p holds those of token p and of what was recalled for it."""

    k: Tensor  # (B, C, 2, H, d), zeros behind the last token
    v: Tensor


@state_class
class ContextState:
    """One row per sequence; as large after one token as after a million."""

    attention: SegmentState
    tail: Tensor  # (B, width-1, 3D) last inputs of the convolution
    memory: KeyValueState  # its chunk is the segment


class MemoryAsContext(nn.Module):
    """Recall, attend, memorise, gate, segment by segment. `y, state = layer(x, state=None, lengths=None)`.

        h_t = norm(M_a(W_q x_t))                       a = last token before t's segment
        y_t = attention of x_t over [persistent tokens | h_s, x_s of the segment, s <= t]
        M is written by y_t as in `TitansMemory`,      o_t = norm(y_t) * sigmoid(norm(M_t(y_t)))

    DEVIATION: a query sees what was recalled for tokens up to its own (the paper's mask shows it all of the segment's
    recall, which depends on later tokens); the memory is read after t's write and not at the segment's end.
    """

    def __init__(self, dim: int, heads: int, expansion: int = 2, chunk_size: int = 64, *, persistent: int = 4) -> None:
        """expansion: of the memory, as in `TitansMemory`; chunk_size: tokens of a segment; persistent: learned tokens
        that every query sees."""
        super().__init__()
        self.frame = Frame(dim, heads, gated=False)
        self.dim, self.heads, self.width, self.chunk_size = dim, heads, self.frame.width, chunk_size
        self.memory = KeyValueMemory(
            dim,
            heads,
            expansion,
            chunk_size,
            memory="mlp",
            eta_max=1.0,
            momentum=0.5,
            half_life=2048,
            decay_to="initial",
        )
        self.persistent = nn.Parameter(torch.randn(persistent, dim))
        self.project_recall, self.project_q, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.project_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.norm_recall, self.norm_out, self.norm_gate = (nn.RMSNorm(dim, eps=1e-6) for _ in range(3))

    def forward(
        self, x: Tensor, state: ContextState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, ContextState]:
        """x (B, T, D) -> y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memory runs in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        check_width(x, self.dim)
        outputs, done = list[Tensor](), 0
        for size in self._pieces(state, len(x), x.shape[1], lengths):
            mine = None if lengths is None else (lengths.to(x.device) - done).clamp(0, size)
            y, state = self._read(x[:, done : done + size], state, mine)
            outputs.append(y)
            done += size
        assert state is not None
        return torch.cat(outputs, 1), state

    def _pieces(self, state: ContextState | None, rows: int, tokens: int, lengths: Tensor | None) -> list[int]:
        """Sizes of the pieces of a call, each of which ends where a row's segment ends, or at the end.

        One token is one piece; more read the counts on the host, once. A row that has read all of its own tokens does
        not count.
        """
        if tokens <= 1:
            return [tokens]
        count = [0] * rows if state is None else state.memory.count.tolist()
        left = [tokens] * rows if lengths is None else lengths.tolist()
        sizes = list[int]()
        while tokens > sum(sizes):
            size = min([tokens - sum(sizes), *(self.chunk_size - c for c, n in zip(count, left, strict=True) if n > 0)])
            count = [(c + min(n, size)) % self.chunk_size for c, n in zip(count, left, strict=True)]
            left = [max(n - size, 0) for n in left]
            sizes.append(size)
        return sizes

    def _read(self, x: Tensor, state: ContextState | None, lengths: Tensor | None) -> tuple[Tensor, ContextState]:
        """A part of one segment in every row."""
        rows, tokens = x.shape[:2]
        count = torch.zeros(rows, dtype=torch.long, device=x.device) if state is None else state.memory.count
        places = count[:, None] + torch.arange(tokens, device=x.device)
        recalled = self._recall(x, None if state is None else state.memory.anchor)
        y, k, v = self._attend(x, recalled, places, None if state is None else state.attention, lengths)
        y = self.norm_out(self.out(y).to(x.dtype))
        queries, keys, values, tail = self.frame.enter(y, None if state is None else state.tail, lengths)
        o, memory = self.memory(y, queries, keys, values, None if state is None else state.memory, lengths)
        gate = torch.sigmoid(self.norm_gate(self.frame.leave(o, x).to(x.dtype)))
        kept = (torch.arange(self.chunk_size, device=x.device) < memory.count[:, None])[..., None, None, None]
        return y * gate, ContextState(SegmentState(k * kept, v * kept), tail, memory)

    def _recall(self, x: Tensor, anchor: list[Tensor] | None) -> Tensor:
        """h (B, T, D): the memory as the segment began, asked about every token."""
        z = unit_norm(split_heads(self.project_recall(x), self.heads).to(memory_dtype(x)))
        with torch.autocast(x.device.type, enabled=False):
            weights = [w.to(z.dtype) for w in self.memory.initial]
            if anchor is not None:
                weights = [w + d for w, d in zip(weights, anchor, strict=True)]
            equation = "bthk,hkf->bthf" if anchor is None else "bthk,bhkf->bthf"
            hidden = F.silu(torch.einsum(equation, z, weights[0]))
            h = z + torch.einsum(equation, hidden, weights[1])
        return self.norm_recall(merge_heads(h).to(x.dtype))

    def _attend(
        self, x: Tensor, recalled: Tensor, places: Tensor, cache: SegmentState | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y (B, T, D), and the segment's keys and values with those of x and h written at their places."""
        rows, tokens = x.shape[:2]
        cos, sin = rotary(places, self.width, x.dtype)
        q = rotate(split_heads(self.project_q(x), self.heads), cos, sin)
        pairs = self.project_kv(torch.stack([recalled, x], 2)).unflatten(-1, (2, self.heads, -1))  # (B, T, 2, 2, H, d)
        k, v = pairs.unbind(3)
        k = torch.stack([rotate(part, cos, sin) for part in k.unbind(2)], 2)
        real = places < self.chunk_size
        if lengths is not None:
            real = real & (torch.arange(tokens, device=x.device) < lengths[:, None])
        at = places.masked_fill(~real, self.chunk_size)[:, :, None, None, None].expand_as(k)
        k = self._written(k, at, None if cache is None else cache.k)
        v = self._written(v, at, None if cache is None else cache.v)
        seen = torch.arange(self.chunk_size, device=x.device) <= places[:, :, None]  # (B, T, C)
        seen = F.pad(seen.repeat_interleave(2, -1), (len(self.persistent), 0), value=True)
        always = self.project_kv(self.persistent).unflatten(-1, (2, self.heads, -1)).unbind(1)  # (N, H, d) each
        keys = torch.cat([always[0].expand(rows, -1, -1, -1), k.flatten(1, 2)], 1).transpose(1, 2)
        values = torch.cat([always[1].expand(rows, -1, -1, -1), v.flatten(1, 2)], 1).transpose(1, 2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen[:, None])
        return merge_heads(o.transpose(1, 2)), k, v

    def _written(self, new: Tensor, at: Tensor, cache: Tensor | None) -> Tensor:
        """The cache (B, C, ...) with `new` (B, T, ...) at places `at`; place C is for what is not real."""
        if cache is None:
            empty = new.new_zeros(len(new), self.chunk_size + 1, *new.shape[2:])
        else:
            empty = F.pad(cache.to(new.dtype), (0, 0, 0, 0, 0, 0, 0, 1))
        return empty.scatter(1, at, new)[:, : self.chunk_size]

    def keys_per_query(self, context: int) -> int:
        """Keys that a query is compared with."""
        return 2 * min(context, self.chunk_size) + len(self.persistent)

    def levels(self) -> list[Level]:
        """Attention inside the segment, the memory, and the projections around them."""
        maps = (self.persistent, *self.project_q.parameters(), *self.project_kv.parameters(), *self.out.parameters())
        attention = Level(
            name=f"attention, segment {self.chunk_size}",
            memory="softmax attention (non-parametric)",
            objective="weighted L2 regression",
            rule="closed form (Nadaraya-Watson)",
            clock="token",
            period=0,
            parameters=sum(p.numel() for p in maps),
            half_life=None,
            transfer="direct, non-parametric",
            state_bytes=4 * 2 * 2 * self.chunk_size * self.dim,
        )
        memory = self.memory.level("memory", beside=self.frame.tail_bytes())
        return [attention, memory, static_level(self, attention.parameters + memory.parameters)]
