"""Self-modifying Titans as a layer: x → short convolution → z, q per head → memories that write themselves → y."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nestling.core.level import Level
from nestling.core.state import state_class
from nestling.memories.projections import ShortConvolution, blocks, join, merge_heads, split_heads, unit_norm
from nestling.ops import dispatch
from nestling.ops.self_modifying import GENERATORS, READ, Rule, memory_names

__all__ = ["GENERATORS", "Rule", "SelfModifyingState", "SelfModifyingTitans"]

MemoryKind = Literal["features", "linear", "mlp"]
_KEEP_ALL = 1e4  # a gate bias at which alpha is exactly 1
_DESCRIPTION = {
    "features": "matrix on fixed features",
    "linear": "matrix",
    "mlp": "2-layer residual MLP",
}


@state_class
class SelfModifyingState:
    """One row per sequence, of constant size. anchor and running are deviations from the initial states,
    (B, H, M, in, out) each; zeros where nothing was read yet."""

    tail: Tensor  # (B, width-1, D) last inputs of the convolution
    anchor: list[Tensor]  # at the last chunk border: what the open chunk's keys, values and gradients are taken at
    running: list[Tensor]  # after the last token
    count: Tensor  # (B,) int64, tokens in the open chunk


class SelfModifyingTitans(nn.Module):
    """Memories k, v, eta, alpha and the one that is read, all adapting in context (paper §8.1-8.2).

    Every memory is written at every token with a key, value and rates that the memories themselves generate; their
    initial states are parameters, trained through the writes. `y, state = layer(x, state=None, lengths=None)`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: float = 1,
        chunk_size: int = 64,
        *,
        memory: MemoryKind = "features",
        rule: Rule | None = None,
        adaptive_q: bool = False,
        frozen: Sequence[str] = (),
        half_life: float | None = 2048,
        generator_rate: float = 0.1,
        convolution: ShortConvolution | None = None,
    ) -> None:
        """expansion: memory hidden width / head width; frozen: memories that no token writes, so that they generate by
        a fixed map; half_life: of the read memory at initialisation, in tokens, None = nothing is forgotten;
        generator_rate: how fast the memories that generate k, v, eta, alpha (, q) start, relative to the read one;
        convolution: in front of z and q, None = width 4 with SiLU (state tracking wants ShortConvolution(dim, 1))."""
        super().__init__()
        _check(dim, heads, expansion, chunk_size, memory, half_life, generator_rate)
        self.dim, self.heads, self.chunk_size, self.memory = dim, heads, chunk_size, memory
        if convolution is not None and convolution.dim != dim:
            raise ValueError(f"convolution has dim={convolution.dim}, the layer {dim}; give both the same")
        self.rule = rule if rule is not None else default_rule(memory)
        self.names = memory_names(6 if adaptive_q else 5)
        if any(name not in self.names[:-1] for name in frozen):
            raise ValueError(f"frozen={tuple(frozen)} must name some of {', '.join(self.names[:-1])}")
        self.frozen = tuple(frozen)
        width = dim // heads
        hidden = round(expansion * width) if memory != "linear" else width
        M = len(self.names)

        self.conv = ShortConvolution(dim) if convolution is None else convolution
        self.project_z = nn.Linear(dim, dim, bias=False)  # mixes the heads before their memories part
        self.project_q = None if adaptive_q else nn.Linear(dim, dim, bias=False)
        self.project_gate = nn.Linear(dim, dim, bias=False)
        self.project_out = nn.Linear(dim, dim, bias=False)
        self.norm = nn.Parameter(torch.ones(dim))
        shapes = {"features": [(hidden, width)], "linear": [(width, width)], "mlp": [(width, hidden), (hidden, width)]}
        self.initial = nn.ParameterList(
            nn.Parameter(torch.randn(heads, M, rows, columns) * rows**-0.5) for rows, columns in shapes[memory]
        )
        self.features = nn.Parameter(torch.randn(heads, width, hidden)) if memory == "features" else None
        self.gate_weight = nn.Parameter(torch.randn(2, heads, width))  # eta, alpha
        # Vectors, not matrices: rules such as "decay what has two dimensions" must not touch them.
        self.eta_bias = nn.Parameter(torch.zeros(heads))
        self.alpha_bias = None if half_life is None else nn.Parameter(torch.full((heads,), _logit_of(half_life)))
        self.rate_logit = nn.Parameter(torch.full((heads * (M - 1),), _logit(generator_rate)))

    @property
    def rates(self) -> Tensor:
        """(H, M): how fast each memory is written and decays, relative to the read memory, which has 1."""
        rates = functional.pad(self.rate_logit.sigmoid().view(self.heads, -1), (0, 1), value=1.0)
        for name in self.frozen:
            rates = rates * (torch.arange(len(self.names), device=rates.device) != self.names.index(name))
        return rates

    def forward(
        self, x: Tensor, state: SelfModifyingState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        """x (B, T, D) → y (B, T, D) and the state after the real tokens of each row (lengths (B,); None = all).

        The memories run in float32 at least, also under autocast. Raises ValueError for a width other than dim.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, SelfModifyingTitans needs (B, T, {self.dim})")
        parts = blocks(x)
        z_and_q, tail = self._enter(parts, None if state is None else state.tail, lengths)
        y, anchor, running = self._remember(z_and_q, state, lengths)
        y = join([self._leave(*both) for both in zip(y.split([p.shape[1] for p in parts], 1), parts, strict=True)])
        count = torch.zeros(len(x), dtype=torch.long, device=x.device) if state is None else state.count
        count = (count + (x.shape[1] if lengths is None else lengths.to(count.device))) % self.chunk_size
        return y, SelfModifyingState(tail, anchor, running, count)

    def _enter(
        self, parts: Sequence[Tensor], tail: Tensor | None, lengths: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Blocks of x (B, T, D) → z and q (B, T, H, K), and the convolution's new tail."""
        projections = [self.project_z] if self.project_q is None else [self.project_z, self.project_q]
        made, begin = [], 0
        for x in parts:
            real = None if lengths is None else (lengths - begin).clamp(0, x.shape[1])
            mixed, tail = self.conv(x, tail, real)
            made.append([unit_norm(split_heads(p(mixed), self.heads).to(_memory_dtype(x))) for p in projections])
            begin += x.shape[1]
        assert tail is not None
        return [join(part) for part in zip(*made, strict=True)], tail

    def _leave(self, y: Tensor, x: Tensor) -> Tensor:
        """What the memory read, y (B, T, H, K), and x (B, T, D) → (B, T, D): norm, gate and projection."""
        y = merge_heads(functional.rms_norm(y, y.shape[-1:])).to(x.dtype) * self.norm.to(x.dtype)
        return self.project_out(y * functional.silu(self.project_gate(x)))

    def _remember(
        self, z_and_q: list[Tensor], state: SelfModifyingState | None, lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """z and q (B, T, H, K) through the op, outside autocast → y (B, T, H, K), anchor, running."""
        z, *q = z_and_q
        alpha_bias = self.alpha_bias if self.alpha_bias is not None else torch.full_like(self.eta_bias, _KEEP_ALL)
        with torch.autocast(z.device.type, enabled=False):
            y, new = dispatch.self_modifying(
                z,
                q[0] if q else None,
                tuple(p.to(z.dtype) for p in self.initial),
                self.gate_weight.to(z.dtype),
                torch.stack([self.eta_bias, alpha_bias]).to(z.dtype),
                self.rates.to(z.dtype),
                rule=self.rule,
                chunk_size=self.chunk_size,
                features=None if self.features is None else self.features.to(z.dtype),
                state=None if state is None else (*state.anchor, *state.running),
                count=None if state is None else state.count,
                lengths=lengths,
            )
        matrices = len(self.initial)
        return y, list(new[:matrices]), list(new[matrices:])

    def half_lives(self) -> dict[str, float | None]:
        """Tokens until an unwritten memory has halved its distance to where it decays to, at a neutral gate; None = it
        does not decay."""
        if self.alpha_bias is None:
            return dict.fromkeys(self.names)
        log_alpha = functional.logsigmoid(self.alpha_bias).detach()[:, None] * self.rates.detach()
        half_lives = (math.log(0.5) / log_alpha.mean(0)).tolist()
        return {n: None if n in self.frozen else t for n, t in zip(self.names, half_lives, strict=True)}

    def levels(self) -> list[Level]:
        """One level per memory."""
        objective = {"dot": "dot product with v̂", "l2": "L2 regression to v̂"}[self.rule.objective]
        rule = "gradient descent" if self.rule.erase == "none" else "DGD (delta gradient descent)"
        own = [sum(p[:, m].numel() for p in self.initial) for m in range(len(self.names))]
        once = 4 * self.dim * (self.conv.width - 1) + 8  # tail and count
        return [
            Level(
                name=name,
                memory=_DESCRIPTION[self.memory],
                objective=objective.replace("v̂", "v") if name == READ and not self.rule.self_values else objective,
                rule=rule,
                clock="token",
                period=self._period(name),
                parameters=parameters,
                half_life=half_life,
                transfer="initialisation (meta-learned)",
                state_bytes=2 * 4 * parameters + once * (name == READ),  # anchor and running
            )
            for (name, half_life), parameters in zip(self.half_lives().items(), own, strict=True)
        ]

    def _period(self, name: str) -> float:
        """Tokens between two writes that are read."""
        if name in self.frozen:
            return math.inf
        return 1 if name == READ and self.rule.read == "causal" else self.chunk_size


def default_rule(memory: MemoryKind) -> Rule:
    """The write that goes with a memory: reflections (eta up to 2) need a memory linear in what is written."""
    return Rule(eta_max=1.0, erase_hidden=True) if memory == "mlp" else Rule()


def _check(
    dim: int, heads: int, expansion: float, chunk_size: int, memory: str, half_life: float | None, generator_rate: float
) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}; choose a multiple")
    if memory not in _DESCRIPTION:
        raise ValueError(f"memory is {memory!r}; use one of {', '.join(_DESCRIPTION)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    if expansion <= 0 or (memory == "linear" and expansion != 1):
        raise ValueError(f"expansion is {expansion}; use a positive number, and 1 for linear memories")
    if (half_life is not None and half_life <= 0) or not 0 < generator_rate < 1:
        raise ValueError(f"half_life={half_life} must be positive and generator_rate={generator_rate} in (0, 1)")


def _logit_of(half_life: float) -> float:
    """The gate bias at which alpha ** half_life = 1/2."""
    return _logit(0.5 ** (1 / half_life))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _memory_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
