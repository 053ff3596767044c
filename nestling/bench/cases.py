"""The registry of ops: inputs of any size for each, and one way to call every form of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.bench import cost as counts
from nestling.ops import dispatch
from nestling.ops.self_modifying import Rule

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Rows, tokens, heads, width of a head, tokens per chunk (of the CMS ops: per write)."""

    rows: int = 2
    tokens: int = 1024
    heads: int = 4
    width: int = 64
    chunk_size: int = 64

    @property
    def count(self) -> int:
        return self.rows * self.tokens


@dataclass(frozen=True)
class OpCase:
    """An op with one choice of memory.

    Attributes:
        op: its name in `nestling.ops.dispatch`.
        inputs: float64 leaves of a shape on the CPU. call: (form, leaves, chunk_size) -> outputs and final state.
        cost: per token and head at (width, chunk_size). by_head: whether the op has heads.
        forward_only: forms without a backward pass. half: whether a GPU runs it in bfloat16 rather than float32.
    """

    op: str
    inputs: Callable[[Shape], Inputs]
    call: Callable[[Any, Inputs, int], Any]
    cost: Callable[[int, int], counts.Cost]
    by_head: bool = True
    forward_only: tuple[str, ...] = ()
    half: bool = True

    def forms(self, device: str = "cpu", *, training: bool = False) -> tuple[str, ...]:
        """The forms that can run on the device, the reference first; in training those with a backward pass."""
        kernels = [f for f in ("triton", "fla") if device.startswith("cuda") and find_spec(f)]
        forms = (f for f in dispatch.FORMS[self.op] if f in ("reference", "chunk", "batched", *kernels))
        return tuple(f for f in forms if not (training and f in self.forward_only))

    def dtype(self, device: str) -> torch.dtype:
        """What the op is measured in."""
        return torch.bfloat16 if device.startswith("cuda") and self.half else torch.float32

    def run(self, form: str, made: Inputs, chunk_size: int) -> list[Tensor]:
        """Every floating output: what is read and the final state."""
        return [y for y in _tensors(self.call(form, made, chunk_size)) if y.is_floating_point()]

    def total(self, shape: Shape) -> counts.Cost:
        """Per token, all heads."""
        return (shape.heads if self.by_head else 1) * self.cost(shape.width, shape.chunk_size)


def chosen(device: str, tokens: int = 1024) -> dict[str, dispatch.Choice]:
    """What `dispatch` runs for each op at the usual widths, and why."""
    return {op: dispatch.choose(op, tokens, device=device) for op in dispatch.FORMS}


def made(case: OpCase, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Leaves that want a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        leaves = case.inputs(shape)
    return {name: x.to(device, dtype).requires_grad_() for name, x in leaves.items()}


def _tensors(results: Any) -> Iterator[Tensor]:
    """The tensors of an op's results: y and its state, which may be a tuple."""
    if isinstance(results, Tensor):
        yield results
    elif results is not None:
        for part in results:
            yield from _tensors(part)


def _normal(*size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*size, dtype=torch.float64)


def _keyed(s: Shape) -> Inputs:
    size = (s.rows, s.tokens, s.heads, s.width)
    unit = {name: F.normalize(_normal(*size), dim=-1) for name in ("q", "k")}
    return unit | {"v": _normal(*size)}


def _gate(s: Shape, bias: float) -> Tensor:
    return F.logsigmoid(_normal(s.rows, s.tokens, s.heads) + bias)


def _linear_attention(s: Shape) -> Inputs:
    return _keyed(s) | {"log_decay": _gate(s, 5)}


def _delta_rule(s: Shape) -> Inputs:
    return _keyed(s) | {"beta": _gate(s, 0).exp()}


def _gated_delta_rule(s: Shape) -> Inputs:
    return _delta_rule(s) | {"g": _gate(s, 5)}


def _exact(op: str) -> Callable[[Any, Inputs, int], Any]:
    return lambda form, x, C: getattr(dispatch, op)(**x, chunk_size=C, form=form)


def _titans(hidden: int) -> OpCase:
    def inputs(s: Shape) -> Inputs:
        K = s.width
        weights = [(K, K)] if hidden == 0 else [(K, hidden * K), (hidden * K, K)]
        gates = {"eta": 0.5 / s.chunk_size * _gate(s, 0).exp(), "log_decay": _gate(s, 5), "log_momentum": _gate(s, 0)}
        return _keyed(s) | gates | {f"W{i}": _normal(s.heads, *w, scale=w[0] ** -0.5) for i, w in enumerate(weights)}

    def call(form: Any, x: Inputs, chunk_size: int) -> Any:
        args = [x[n] for n in ("q", "k", "v", "eta", "log_decay", "log_momentum")]
        weights = tuple(x[n] for n in ("W0", "W1") if n in x)
        return dispatch.titans(*args, weights=weights, chunk_size=chunk_size, decay_to="initial", form=form)

    return OpCase("titans", inputs, call, lambda K, C: counts.titans(K, C, hidden * K))


def _self_modifying(memory: str) -> OpCase:
    rule = Rule(eta_max=1.0, erase_hidden=True) if memory == "mlp" else Rule()

    def inputs(s: Shape) -> Inputs:
        H, K, M = s.heads, s.width, 5
        z, q = (F.normalize(_normal(s.rows, s.tokens, H, K), dim=-1) for _ in range(2))
        weights = {f"W{i}": _normal(H, M, K, K, scale=K**-0.5) for i in range(2 if memory == "mlp" else 1)}
        gates = {"weight": _normal(2, H, K), "bias": torch.tensor([[0.0], [7.0]], dtype=torch.float64).repeat(1, H)}
        rates = torch.tensor([0.1] * (M - 1) + [1.0], dtype=torch.float64).repeat(H, 1)
        extra = {"features": _normal(H, K, K)} if memory == "features" else {}
        return {"z": z, "q": q} | weights | gates | {"rates": rates} | extra

    def call(form: Any, x: Inputs, chunk_size: int) -> Any:
        weights = tuple(x[n] for n in ("W0", "W1") if n in x)
        return dispatch.self_modifying(
            x["z"], x["q"], weights, x["weight"], x["bias"], x["rates"],
            rule=rule, chunk_size=chunk_size, features=x.get("features"), form=form,
        )  # fmt: skip

    return OpCase("self_modifying", inputs, call, lambda K, C: counts.self_modifying(K, C, K, memory=memory))


def _cms_inputs(s: Shape) -> Inputs:
    x, error = (_normal(s.rows, s.tokens, s.width) for _ in range(2))
    return {"x": x, "error": error, "rate": torch.full((s.rows, s.tokens), 0.01, dtype=torch.float64)}


def _cms_writes(s: Shape) -> Inputs:
    """One write for every chunk of tokens, all at once."""
    writes, C, K = s.rows * max(1, s.tokens // s.chunk_size), min(s.tokens, s.chunk_size), s.width
    left, right = (_normal(writes, C, K) for _ in range(2))
    scale = torch.full((writes,), -0.01, dtype=torch.float64)
    return {"delta": _normal(writes, K, K), "left": left, "right": right, "scale": scale}


def _squares(s: Shape) -> Inputs:
    """As many square matrices of the width as make one row per token and head."""
    return {"X": _normal(s.rows * s.heads * max(1, s.tokens // s.width), s.width, s.width)}


OPS: dict[str, OpCase] = {
    "linear_attention": OpCase(
        "linear_attention", _linear_attention, _exact("linear_attention"), counts.linear_attention
    ),
    "delta_rule": OpCase("delta_rule", _delta_rule, _exact("delta_rule"), counts.delta_rule),
    "gated_delta_rule": OpCase(
        "gated_delta_rule", _gated_delta_rule, _exact("gated_delta_rule"), counts.gated_delta_rule
    ),
    "titans": _titans(0),
    "titans mlp": _titans(2),
    "self_modifying": _self_modifying("features"),
    "self_modifying linear": _self_modifying("linear"),
    "self_modifying mlp": _self_modifying("mlp"),
    "cms_update": OpCase(
        "cms_update",
        _cms_inputs,
        lambda form, x, C: dispatch.cms_update(**x, period=C, form=form),
        lambda K, C: counts.cms_update(K, K, C),
        by_head=False,
    ),
    "cms_write": OpCase(
        "cms_write",
        _cms_writes,
        lambda form, x, C: dispatch.cms_write(**x, keep=0.9, form=form),
        lambda K, C: counts.cms_write(K, K, C),
        by_head=False,
        forward_only=("triton",),
    ),
    "newton_schulz": OpCase(
        "newton_schulz",
        _squares,
        lambda form, x, C: dispatch.newton_schulz(x["X"], form=form),
        lambda K, C: counts.newton_schulz(K, K),
        forward_only=("triton",),
        half=False,  # bfloat16 is chosen by its own error there: ops/newton_schulz/README.md
    ),
}
