"""The gate: no speed is reported for a form whose outputs or gradients are not those of the reference.

The reference runs in float64 on the rounded inputs of the fast form, so both are held to what is true of those
numbers. Errors are relative RMS, per output and per gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.bench.cases import OpCase, Shape, made
from nestling.models import LanguageModel
from nestling.testing import random_loss

ALLOWED = {  # forward, gradients (docs/performance.md)
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (5e-3, 1e-2),
}
Results = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor | None]]]


def op_gate(
    case: OpCase, form: str, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> str | None:
    """None where the form agrees with the reference on a few chunks and an open one, else what differs; in outputs
    alone where the form has no backward pass."""
    small = replace(shape, rows=min(shape.rows, 2), tokens=min(shape.tokens, 2 * shape.chunk_size + 5))
    trains = form not in case.forward_only

    def results(name: str, kind: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = {n: x.detach().to(kind).requires_grad_(trains) for n, x in made(case, small, dtype, device).items()}
        outputs = case.run(name, leaves, small.chunk_size)
        if not trains:
            return outputs, []
        used = [y for y in outputs if y.requires_grad]
        return outputs, list(torch.autograd.grad(random_loss(used), list(leaves.values()), allow_unused=True))

    return compare(lambda: results(form, dtype), lambda: results("reference", torch.float64), ALLOWED[dtype])


def model_gate(model: LanguageModel, tokens: Tensor) -> str | None:
    """None where `model.loss` has the gradients of the cross-entropy of the logits, in float64, else what differs."""
    twin = deepcopy(model).double()
    parameters = list(twin.parameters())

    def fast() -> tuple[list[Tensor], list[Tensor | None]]:
        loss, _ = twin.loss(tokens)
        return [loss.detach()], list(torch.autograd.grad(loss, parameters, allow_unused=True))

    def plain() -> tuple[list[Tensor], list[Tensor | None]]:
        logits = twin(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return [loss.detach()], list(torch.autograd.grad(loss, parameters, allow_unused=True))

    return compare(fast, plain, ALLOWED[torch.float64])


def compare(fast: Results, reference: Results, allowed: tuple[float, float]) -> str | None:
    """None, or the first result that is off, with its error. What raises is off too."""
    try:
        ours = fast()
    except (RuntimeError, ValueError) as raised:
        return f"{type(raised).__name__}: {' '.join(str(raised).split())}"
    for kind, limit, mine, theirs in zip(("output", "gradient"), allowed, ours, reference(), strict=True):
        if len(mine) != len(theirs):
            return f"{len(mine)} {kind}s, the reference has {len(theirs)}"
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            error = distance(a, b)
            if not error <= limit:
                return f"{kind} {i} is off by {error:.1e}, allowed {limit:.0e}"
    return None


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """Relative RMS; missing counts as zero, so a missing gradient is only right where the reference has none."""
    if a is None or b is None:
        other = b if a is None else a
        return 0.0 if other is None or not bool(other.any()) else float("inf")
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    size = float(b.square().mean().sqrt()) if b.numel() else 0.0
    error = float((a - b).square().mean().sqrt()) if b.numel() else 0.0
    return error / max(size, 1e-12)
