"""FastLinear: a linear map that each sequence may bend, and the reading in which that happens.

A `Reading` is what is true while a model reads a piece of text: which fast weights each layer adds to its slow ones,
and, if something is to be learned from the piece, a tape of what went in (the keys) and what came out (whose
gradients are the values, the local surprise). It is passed through a context variable, so that it reaches the layers
through any module, ours or not, and no module ever changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...core.spread import by_parts, is_spread, local, whole, whole_norm
from .matrix import FastMatrix

_MERGE_FROM = 16  # tokens from which W + D is formed once instead of applying W and D one after the other


@dataclass(frozen=True)
class Trace:
    """One use of a FastLinear: its input x (B, T, I), and the tensor by which the loss is to be differentiated.

    `wanted` is the weights in force (B, O, I), or, for a text so short that factors are much smaller than a matrix,
    the output (B, T, O), whose gradient is the left factor of the weights' gradient.
    """

    x: Tensor
    wanted: Tensor
    factored: bool

    def gradient(self, grad: Tensor, keys: Tensor) -> FastMatrix:
        """The gradient of the weights, from the gradient of `wanted`; `keys` is x in their precision."""
        return FastMatrix(left=grad.to(keys.dtype), right=keys) if self.factored else FastMatrix(dense=grad)


@dataclass(frozen=True, eq=False)
class Reading:
    """Fast weights in force, and the tape (None = nothing is recorded).

    `merged` holds W + D (B, O, I) where that was formed beforehand (`once`).
    `growth` holds for a learned rate r the factor r / stop_gradient(r) = 1: it lets the first-order outer gradient
    see dL/d log r = <dL/dD, D>, the slope along the way the weights have gone.
    """

    deltas: dict[nn.Module, FastMatrix]
    growth: dict[nn.Module, Tensor] = field(default_factory=dict)
    tape: dict[nn.Module, list[Trace]] | None = None
    merged: dict[nn.Module, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Bend:
    """What a reading makes of one map for one piece of text, formed before the map runs.

    Attributes:
        weight: (B, O, I) the weights in force in each row; None = those of the map.
        tap: zeros (B, T, O) that are added to the output, for its gradient; None = the gradient of `weight` is wanted.
        keys: takes the input, if something is to be learned from it.
    """

    weight: Tensor | None = None
    tap: Tensor | None = None
    keys: list[Tensor] | None = None

    def read(self, x: Tensor) -> Tensor:
        """x (B, T, I) -> (B, T, O), without the bias."""
        assert self.weight is not None
        if self.keys is not None:
            self.keys.append(x.detach())
        z = _multiply(x, self.weight)
        return z if self.tap is None else z + self.tap

    def trace(self) -> Trace:
        """What is to be learned from the piece, once it was read."""
        assert self.weight is not None and self.keys is not None
        (x,), factored = self.keys, self.tap is not None
        return Trace(x, self.weight if self.tap is None else self.tap, factored)


_ACTIVE: ContextVar[Reading | None] = ContextVar("nestling_reading", default=None)


@contextmanager
def reading(now: Reading) -> Iterator[Reading]:
    """Make `now` the reading of every FastLinear called inside."""
    token = _ACTIVE.set(now)
    try:
        yield now
    finally:
        _ACTIVE.reset(token)


@contextmanager
def untaped() -> Iterator[None]:
    """Go on in the same reading without recording: what is read inside teaches nothing."""
    now = _ACTIVE.get()
    token = _ACTIVE.set(None if now is None else replace(now, tape=None))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def ahead(maps: Sequence[FastLinear], rows: int, tokens: int) -> Iterator[list[Bend]]:
    """Ask the reading around about `maps` before they run, each once, on `tokens` tokens in each of `rows` rows.

    Inside, a map that is called with its bend asks nothing, so that torch.compile can trace it. The weights of every
    row are formed, whether they were written yet or not, and one graph serves both.
    """
    now = _ACTIVE.get()
    bends = [Bend() if now is None else m.bend(now, rows, tokens) for m in maps]
    yield bends
    if now is not None and now.tape is not None:
        for m, bend in zip(maps, bends, strict=True):
            now.tape.setdefault(m, []).append(bend.trace())


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing that knows fast weights: function(*args), computed again in the backward pass.

    `torch.utils.checkpoint` alone would compute again with the slow weights, because the reading is over by then.
    """
    now = _ACTIVE.get()
    again = None if now is None else replace(now, tape=None if now.tape is None else {})  # the same arithmetic
    contexts = lambda: (nullcontext(), nullcontext() if again is None else reading(again))  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


class FastLinear(nn.Linear):
    """nn.Linear whose weight is W + D, with D of the sequence at hand, while a `Reading` says so; else nn.Linear.

    With `metric` it also keeps what old text looked like from its input side: `inner_keys` (I, I), the second moment
    of its inputs scaled to mean eigenvalue 1, and `inner_metric` = (I + kappa C)^-1, which turns a write away from
    directions that old text uses (design: old-key metric). Until `remember` is called both are neutral.
    """

    inner_keys: Tensor | None
    inner_metric: Tensor | None
    noted: Tensor | None = None  # the length of the weight, while the weight itself is spread over processes

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, metric: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("inner_keys", None)
        self.register_buffer("inner_metric", None)
        if metric:
            self.keep_old_keys()

    def adopt(self, weight: Tensor, bias: Tensor | None) -> None:
        """Become the linear map with these parameters, which stay the same objects; nothing is initialised."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", weight)  # type: ignore[arg-type]
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.register_buffer("inner_keys", None)
        self.register_buffer("inner_metric", None)

    def forward(self, x: Tensor, bend: Bend | None = None) -> Tensor:
        """x (B, ..., I) -> (B, ..., O). `bend`: what the reading says, where that was asked `ahead`; None = ask now."""
        split = bend is None and is_spread(x)  # maps of compiled blocks are whole
        return by_parts(self._map, x, self.weight) if split else self._map(x, bend)

    def _map(self, x: Tensor, bend: Bend | None = None) -> Tensor:
        now = _ACTIVE.get() if bend is None else None
        if now is None and (bend is None or bend.weight is None):
            return F.linear(x, self.weight if bend is not None else local(self.weight), self.bias)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if now is None:
            z = bend.read(rows)  # type: ignore[union-attr]
        elif self in now.merged:
            z = rows @ now.merged[self].mT.to(x.dtype)
        else:
            z = self._read(rows, self._delta(now, len(rows)), now.tape)
        z = z if self.bias is None else z + self.bias
        return z.view(*x.shape[:-1], -1)

    def keep_old_keys(self) -> None:
        """Make room for statistics of old inputs, neutral until `remember` is called."""
        device = self.weight.device
        self.inner_keys = torch.zeros(self.in_features, self.in_features, device=device)
        self.inner_metric = torch.eye(self.in_features, device=device)

    def _delta(self, now: Reading, rows: int) -> FastMatrix | None:
        """What each sequence adds to the weight; None = nothing yet."""
        delta = now.deltas.get(self)
        if delta is None or delta.empty:
            return None
        return delta.times(now.growth[self].expand(rows)) if self in now.growth else delta

    def _read(self, x: Tensor, delta: FastMatrix | None, tape: dict[nn.Module, list[Trace]] | None) -> Tensor:
        """(W + D) x for x (B, T, I), without the bias."""
        tokens, slow = x.shape[1], local(self.weight)
        as_matrix = tape is not None and self.teaches_as_matrix(tokens)
        if as_matrix or (delta is not None and delta.left is None and tokens >= _MERGE_FROM):
            weight = slow.expand(len(x), -1, -1) if delta is None else slow + delta.to_dense()
            if as_matrix:
                wanted = weight = _differentiable(weight)
            z = _multiply(x, weight)
        else:
            z = F.linear(x, slow) if delta is None else F.linear(x, slow) + delta.apply(x)
        if tape is not None:
            if not as_matrix:
                wanted = z = _differentiable(z)
            tape.setdefault(self, []).append(Trace(x, wanted, not as_matrix))
        return z

    def teaches_as_matrix(self, tokens: int) -> bool:
        """Whether the gradient of so many tokens is smaller as a matrix than as outer products."""
        here = local(self.weight).shape
        return 2 * tokens * sum(here) >= here.numel()

    def bend(self, now: Reading, rows: int, tokens: int) -> Bend:
        """What the reading makes of this map for a piece of `tokens` tokens in each of `rows` rows."""
        delta = self._delta(now, rows)
        weight = self.weight.expand(rows, -1, -1).contiguous() if delta is None else self.weight + delta.to_dense()
        if now.tape is None:
            return Bend(weight)
        if self.teaches_as_matrix(tokens):
            return Bend(_differentiable(weight), keys=[])
        zero = torch.zeros((), dtype=_dtype_of_products(weight), device=weight.device)
        return Bend(weight, zero.expand(rows, tokens, self.out_features).requires_grad_(), keys=[])

    def length(self) -> Tensor:
        """The Frobenius norm of the weight."""
        return whole(torch.linalg.vector_norm(self.weight)) if self.noted is None else self.noted

    def over_parts(self, norms: Tensor) -> Tensor:
        """Norms of what is split as the weight is, from those of this process's part; all of it is here while noted."""
        return whole_norm(norms, self.weight) if self.noted is None else norms

    def remember(self, moment: Tensor, *, kappa: float, keep: float) -> None:
        """Fold the second moment (I, I) of inputs on old text into the metric; `keep` in [0, 1) stays of before."""
        if self.inner_keys is None or self.inner_metric is None:
            return
        with torch.no_grad():
            moment = moment.to(self.inner_keys.dtype)
            scaled = moment / moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
            fresh = not bool(self.inner_keys.any())
            self.inner_keys.lerp_(scaled, 1.0 if fresh else 1.0 - keep)
            self.spare_old_keys(kappa)

    def spare_old_keys(self, kappa: float) -> None:
        """Make the metric (I + kappa C)^-1 of the old keys C that are known."""
        if self.inner_keys is None or self.inner_metric is None:
            return
        with torch.no_grad():
            eye = torch.eye(self.in_features, dtype=self.inner_keys.dtype, device=self.inner_keys.device)
            self.inner_metric.copy_(torch.linalg.inv(eye + kappa * self.inner_keys))


def _differentiable(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.requires_grad_()


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, I) times the weights (B, O, I) of each row, in the precision of the arithmetic around."""
    dtype = _dtype_of_products(x)
    return _RowProduct.apply(x.to(dtype), weight.to(dtype))


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """In which precision the arithmetic around multiplies x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _RowProduct(torch.autograd.Function):
    """x W^T for every row. The gradient of the weights is one product per row, and lies in memory as they do: a level
    learns from it as it is, and its sum over the rows is the gradient of the slow weight they share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            grad.mT @ x if ctx.needs_input_grad[1] else None,
        )
