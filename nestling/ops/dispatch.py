"""One function per op: choose a form by name, or let the library choose.

"reference" is the loop that is the equation, "chunk" the parallel form in torch ("batched" where there are no tokens),
"triton" a GPU kernel, "fla" the kernel of flash-linear-attention. All give the same numbers up to rounding (README.md
has the measured error). "auto" takes the kernel for CUDA tensors that it supports and the parallel form otherwise, and
`choose` says why. A form is a module of the op's folder with a function named like the op: a new one is a file and a
word in FORMS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nestling.ops import newton_schulz as _newton_schulz
from nestling.ops import self_modifying as _self_modifying

Form = Literal["auto", "reference", "chunk", "batched", "triton", "fla"]
FORMS: dict[str, tuple[str, ...]] = {
    "linear_attention": ("reference", "chunk"),
    "delta_rule": ("reference", "chunk", "triton"),
    "gated_delta_rule": ("reference", "chunk", "triton", "fla"),
    "selective_scan": ("reference", "chunk"),
    "titans": ("reference", "chunk", "triton"),
    "ttt": ("reference", "chunk"),
    "self_modifying": ("reference", "chunk", "triton"),
    "cms_update": ("reference", "chunk"),
    "cms_write": ("reference", "chunk", "triton"),
    "newton_schulz": ("reference", "batched", "triton"),
}
# chunk_size changes their speed and not their numbers
EXACT = ("linear_attention", "delta_rule", "gated_delta_rule", "selective_scan")
KERNEL_WIDTHS = (16, 32, 64, 128)
KERNEL_SIDE = 256  # rows of a matrix; below, a launch costs more than half of a symmetric product saves
KERNEL_CHUNK = 64  # tokens; the C x C matrices of a longer chunk do not fit on a multiprocessor beside the memory


class Choice(NamedTuple):
    """The form that a call runs, and the reason in words."""

    form: str
    reason: str


def choose(
    op: str,
    tokens: int,
    form: Form = "auto",
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    widths: Sequence[int] = (64,),
    chunk_size: int = 64,
    obstacle: str | None = None,
) -> Choice:
    """Which form a call of this many tokens runs, and why: what `auto` means on this machine for these shapes.

    dtype and device are those of the values, widths the feature widths of the memory (keys, values, hidden); obstacle
    is what the op itself says against its kernel in this call.
    Raises ValueError for a form that the op lacks, or that cannot run here.
    """
    if form != "auto" and form not in FORMS[op]:
        raise ValueError(f"form is {form!r}; {op} has {', '.join(('auto', *FORMS[op]))}")
    device, parallel = torch.device(device), FORMS[op][1]
    if form in ("reference", parallel):
        return Choice(form, "named by the caller")
    if form != "auto":
        obstacle = obstacle or _obstacle(form, device, dtype, widths, chunk_size)
        if obstacle:
            raise ValueError(f"form is {form!r}, but {obstacle}; use 'auto' or '{parallel}'")
        return Choice(form, "named by the caller")
    if tokens == 1 and op in EXACT:
        return Choice("reference", "for one token the loop has less to set up")
    if "triton" not in FORMS[op]:
        return Choice(parallel, "the op has no kernel")
    if device.type != "cuda":
        return Choice(parallel, f"the tensors are on {device.type}")
    obstacle = obstacle or _obstacle("triton", device, dtype, widths, chunk_size)
    return Choice(parallel, obstacle) if obstacle else Choice("triton", "CUDA tensors of a shape that the kernel takes")


def _obstacle(
    form: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int], chunk_size: int
) -> str | None:
    """What stands in the way of a kernel, or None."""
    if find_spec(form) is None:
        return f"the package {form} is not installed"
    interpreted = form == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type} and the kernel needs cuda"
    dtypes = (torch.float32, torch.bfloat16) if form == "triton" else (torch.bfloat16, torch.float16)
    if dtype not in dtypes:
        return f"the values are {dtype} and the kernel takes {' or '.join(map(str, dtypes))}"
    if any(width not in KERNEL_WIDTHS for width in widths):
        return f"the widths are {tuple(widths)} and the kernel takes {KERNEL_WIDTHS}"
    if chunk_size > KERNEL_CHUNK:
        return f"chunk_size is {chunk_size}: plain batched products fill the card with chunks above {KERNEL_CHUNK}"
    return None


def _function(op: str, form: str) -> Callable[..., Any]:
    """The op's function in that form; kernels are imported when they are first chosen."""
    return getattr(import_module(f"nestling.ops.{op}.{form}"), op)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """M <- alpha M + k v^T, o = M^T q; see linear_attention.reference."""
    return _exact("linear_attention", form, (q, k, v, log_decay), initial_state, chunk_size)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """M <- (I - beta k k^T) M + beta k v^T, o = M^T q; see delta_rule.reference."""
    return _exact("delta_rule", form, (q, k, v, beta), initial_state, chunk_size)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """M <- e^g (I - beta k k^T) M + beta k v^T, o = M^T q; see gated_delta_rule.reference."""
    return _exact("gated_delta_rule", form, (q, k, v, beta, g), initial_state, chunk_size)


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """h <- e^(-step rate) h + step x write^T, y = h read; see selective_scan.reference."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    chosen = choose("selective_scan", x.shape[1], form, x.device).form
    options = {} if chosen == "reference" else {"chunk_size": chunk_size}
    run = _function("selective_scan", chosen)
    return run(x, step, rate, write, read, initial_state=initial_state, **options)


def titans(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, *gates: Tensor | None, form: Form = "auto", **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A memory written by its surprise with momentum and forgetting; arguments and results: titans.reference."""
    widths = {size for w in options["weights"] for size in w.shape[1:]}
    chosen = choose(
        "titans",
        q.shape[1],
        form,
        v.device,
        dtype=v.dtype,
        widths=sorted(widths),
        chunk_size=options.get("chunk_size", 64),
    )
    return _function("titans", chosen.form)(q, k, v, eta, *gates, **options)


def ttt(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, *, form: Form = "auto", **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A memory with a norm inside, trained on what it reads; arguments and results: ttt.reference."""
    chosen = choose("ttt", q.shape[1], form, v.device)
    return _function("ttt", chosen.form)(q, k, v, eta, **options)


def self_modifying(
    z: Tensor, q: Tensor | None, *arguments: Any, form: Form = "auto", **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Memories that generate what they are written with; arguments and results: self_modifying.chunk."""
    weights, rule, chunk_size = arguments[0], options["rule"], options["chunk_size"]
    chosen = choose(
        "self_modifying",
        z.shape[1],
        form,
        z.device,
        dtype=z.dtype,
        widths=weights[0].shape[2:],
        chunk_size=chunk_size,
        obstacle=_self_modifying.kernel_obstacle(rule, weights, q is not None, chunk_size),
    )
    return _function("self_modifying", chosen.form)(z, q, *arguments, **options)


def cms_update(
    x: Tensor, error: Tensor, rate: Tensor, *, form: Form = "auto", **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collect gradients for `period` tokens, then write once; arguments and results: cms_update.reference."""
    chosen = choose("cms_update", x.shape[1], form, x.device)
    return _function("cms_update", chosen.form)(x, error, rate, **options)


def cms_write(
    delta: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, keep: float = 1.0, form: Form = "auto"
) -> Tensor:
    """Add a factored gradient to what a level has written before; arguments and result: cms_write.reference."""
    asked = torch.is_grad_enabled() and any(x.requires_grad for x in (delta, left, right, scale))
    obstacle = "gradients are asked for and the kernel has no backward" if asked else None
    chosen = choose("cms_write", left.shape[1], form, delta.device, dtype=delta.dtype, widths=(), obstacle=obstacle)
    return _function("cms_write", chosen.form)(delta, left, right, scale, keep=keep)


def newton_schulz(
    X: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = _newton_schulz.QUINTIC,
    *,
    eps: float = 1e-7,
    form: Form = "auto",
) -> Tensor:
    """The orthogonal factor of each matrix X (..., m, n), computed in X's dtype; see newton_schulz.reference."""
    rows = min(X.shape[-2:])
    obstacle = "the kernel has no gradient" if X.requires_grad and torch.is_grad_enabled() else None
    if form == "auto" and rows < KERNEL_SIDE:
        obstacle = obstacle or f"the matrices have {rows} rows and the kernel pays from {KERNEL_SIDE} on"
    chosen = choose("newton_schulz", 0, form, X.device, dtype=X.dtype, widths=(), obstacle=obstacle)
    return _function("newton_schulz", chosen.form)(X, steps, coefficients, eps=eps)


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """In which dtype Newton-Schulz of float32 matrices is fastest: bfloat16 where the device multiplies it natively."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def _exact(
    op: str, form: Form, tensors: tuple[Tensor | None, ...], state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """An op whose chunk form is exact: chunk_size changes its speed and never its numbers."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    k, v = tensors[1:3]
    assert k is not None and v is not None
    widths = (k.shape[-1], v.shape[-1])
    chosen = choose(op, v.shape[1], form, v.device, dtype=v.dtype, widths=widths, chunk_size=chunk_size).form
    options = {} if chosen == "reference" else {"chunk_size": chunk_size}
    if (op, chosen) == ("delta_rule", "triton"):  # the gated rule that keeps everything
        op, tensors = "gated_delta_rule", (*tensors, torch.zeros_like(v[..., 0]))
    return _function(op, chosen)(*tensors, initial_state=state, **options)
