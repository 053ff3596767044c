"""One function per op: choose a form by name, or let the library choose.

"reference" is the loop that is the equation, "chunk" the parallel form; "auto" takes the chunk form wherever it is
the faster one. Both give the same numbers up to rounding (README.md has the measured error). A faster backend, ours
or another library's, replaces one line here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from nestling.ops import cms_update as _cms_update
from nestling.ops import delta_rule as _delta_rule
from nestling.ops import gated_delta_rule as _gated_delta_rule
from nestling.ops import linear_attention as _linear_attention
from nestling.ops import titans as _titans
from nestling.ops.self_modifying import chunk as _self_modifying_chunk
from nestling.ops.self_modifying import reference as _self_modifying_reference

Form = Literal["auto", "reference", "chunk"]
FORMS = ("auto", "reference", "chunk")


def choose(op: str, tokens: int, form: Form = "auto") -> str:
    """The form that a call with this many tokens runs: for one token the loop has less to set up.

    Raises ValueError for an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; use one of {', '.join(FORMS)}")
    if form != "auto":
        return form
    single_step_is_a_loop = op in ("linear_attention", "delta_rule", "gated_delta_rule")
    return "reference" if tokens == 1 and single_step_is_a_loop else "chunk"


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
    return _exact(_linear_attention, form, (q, k, v, log_decay), initial_state, chunk_size)


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
    return _exact(_delta_rule, form, (q, k, v, beta), initial_state, chunk_size)


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
    return _exact(_gated_delta_rule, form, (q, k, v, beta, g), initial_state, chunk_size)


def titans(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, *gates: Tensor | None, form: Form = "auto", **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A memory written by its surprise with momentum and forgetting; arguments and results: titans.reference."""
    function = getattr(_titans, choose("titans", q.shape[1], form)).titans
    return function(q, k, v, eta, *gates, **options)


def self_modifying(
    z: Tensor, q: Tensor | None, *arguments: Any, form: Form = "auto", **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Memories that generate what they are written with; arguments and results: self_modifying.chunk."""
    forms = {"chunk": _self_modifying_chunk, "reference": _self_modifying_reference}
    return forms[choose("self_modifying", z.shape[1], form)].self_modifying(z, q, *arguments, **options)


def cms_update(
    x: Tensor, error: Tensor, rate: Tensor, *, form: Form = "auto", **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collect gradients for `period` tokens, then write once; arguments and results: cms_update.reference."""
    function = getattr(_cms_update, choose("cms_update", x.shape[1], form)).cms_update
    return function(x, error, rate, **options)


def _exact(
    op: ModuleType, form: Form, tensors: tuple[Tensor | None, ...], state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """An op whose chunk form is exact: chunk_size changes its speed and never its numbers."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    name = op.__name__.rpartition(".")[2]
    values = tensors[2]
    assert values is not None
    if choose(name, values.shape[1], form) == "reference":
        return getattr(op.reference, name)(*tensors, initial_state=state)
    return getattr(op.chunk, name)(*tensors, initial_state=state, chunk_size=chunk_size)
