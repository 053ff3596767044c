"""What stands around a token memory that is given its keys and values: q, k, v before it, norm and gate after it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.level import Level
from nestling.memories.projections import ShortConvolution, merge_heads, split_heads, unit_norm


class Frame(nn.Module):
    """x -> q, k, v per head: projection, short convolution with SiLU, unit-norm q, k. o -> y: norm, gate, projection.

    Source: [Titans] section 4.4, paper section 8.3, DeltaNet and Gated DeltaNet; the gate is the "note on gating" of
    section 5 of the paper.
    """

    def __init__(self, dim: int, heads: int, *, expansion: int = 1, gated: bool = True) -> None:
        """expansion: width of a value / width of a key; gated: whether the token scales what is read."""
        super().__init__()
        self.dim, self.heads, self.width = dim, heads, head_width(dim, heads)
        values = expansion * dim
        self.project_qkv = nn.Linear(dim, 2 * dim + values, bias=False)
        self.conv = ShortConvolution(2 * dim + values)
        self.project_gate = nn.Linear(dim, values, bias=False) if gated else None
        self.project_out = nn.Linear(values, dim, bias=False)
        self.norm = nn.Parameter(torch.ones(heads, expansion * self.width))

    def enter(self, x: Tensor, tail: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q, k (B, T, H, K), v (B, T, H, V) in float32 at least, and the convolution's new tail.

        Raises ValueError for a width other than dim.
        """
        check_width(x, self.dim)
        mixed, tail = self.conv(self.project_qkv(x), tail, lengths)
        parts = mixed.to(memory_dtype(x)).split([self.dim, self.dim, mixed.shape[-1] - 2 * self.dim], dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return unit_norm(q), unit_norm(k), v, tail

    def leave(self, o: Tensor, x: Tensor) -> Tensor:
        """o (B, T, H, V) -> y (B, T, D)."""
        o = F.rms_norm(o, o.shape[-1:], eps=1e-5).to(x.dtype) * self.norm.to(x.dtype)
        y = merge_heads(o)
        return self.project_out(y if self.project_gate is None else y * F.silu(self.project_gate(x)))

    def tail_bytes(self) -> int:
        """Bytes of the convolution's tail per row in float32."""
        return 4 * (self.conv.width - 1) * self.conv.dim


class TokenGates(nn.Module):
    """Per token and head numbers in (0, 1): sigmoid(w x + b), one set per name, b chosen by its value at x = 0."""

    def __init__(self, dim: int, heads: int, **start: float) -> None:
        super().__init__()
        self.names, self.heads = tuple(start), heads
        self.linear = nn.Linear(dim, heads * len(start))
        with torch.no_grad():
            value = torch.tensor(list(start.values()), dtype=torch.float64)
            self.linear.bias.copy_(torch.logit(value).repeat_interleave(heads))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x (B, T, D) -> log gates (B, T, H) by name, float32 at least."""
        logs = F.logsigmoid(self.linear(x).to(memory_dtype(x)))
        return dict(zip(self.names, logs.split(self.heads, dim=-1), strict=True))

    def at_rest(self, name: str) -> Tensor:
        """(H,): the gate's value at x = 0."""
        return self.linear.bias.detach().split(self.heads)[self.names.index(name)].double().sigmoid()


class DecayGate(nn.Module):
    """log alpha = -rate softplus(w x + b) per token and head: how much Gated DeltaNet forgets.

    Starts as published: rates uniform up to 16, softplus(b) log-uniform in [0.001, 0.1], so that heads differ.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, heads)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
        with torch.no_grad():
            self.linear.bias.copy_(inverse_softplus(log_uniform(heads, 1e-3, 1e-1)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> log alpha (B, T, H), float32 at least."""
        step = F.softplus(self.linear(x).to(memory_dtype(x)))
        return -self.log_rate.to(step.dtype).exp() * step

    def at_rest(self) -> Tensor:
        """(H,): log alpha at x = 0."""
        return -self.log_rate.detach().double().exp() * F.softplus(self.linear.bias.detach().double())


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """(size,) numbers whose logarithm is uniform."""
    return torch.empty(size).uniform_(math.log(low), math.log(high)).exp()


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x > 0."""
    return x + torch.log(-torch.expm1(-x))


def head_width(dim: int, heads: int) -> int:
    """Width of a head. Raises ValueError where dim does not split."""
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}; choose a multiple")
    return dim // heads


def check_width(x: Tensor, dim: int) -> None:
    """Raises ValueError for anything but (B, T, dim)."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}, this layer needs (B, T, {dim})")


def memory_dtype(x: Tensor) -> torch.dtype:
    """The dtype a memory runs in for inputs x."""
    return torch.promote_types(x.dtype, torch.float32)


def is_real(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, T, 1) bool, False at padding; None where every token is real."""
    if lengths is None:
        return None
    return (torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None])[..., None]


def static_level(layer: nn.Module, initial: int) -> Level:
    """The level of everything around the memory: projections that no token writes."""
    return Level(
        name="projections",
        memory="matrices",
        objective="outer loss",
        rule="outer optimizer",
        clock="token",
        period=float("inf"),
        parameters=sum(p.numel() for p in layer.parameters()) - initial,
        transfer="backpropagation",
        state_bytes=0,
    )
