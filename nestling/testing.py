"""Checks that our tests and users' tests share: named comparisons, gradients in float64, equal forms, carried state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.core.state import Tree, flatten


def assert_close(actual: Tensor, expected: Tensor, name: str = "tensor", rtol: float = 1e-10) -> None:
    """Raise AssertionError unless max |actual - expected| <= rtol * max(|expected|, 1e-3), shapes and dtypes equal.

    The error is measured against the largest entry, so that entries near zero do not decide. The message has the
    name, the shape, the largest and the RMS error, and where the largest is.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
        )
    if actual.numel() == 0:
        return
    goal = expected.detach().double()
    error = (actual.detach().double() - goal).abs()
    allowed = rtol * max(float(goal.abs().max()), 1e-3)
    if not bool((error <= allowed).all()):  # also catches NaN
        where = [int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)]
        rms = float(error.square().mean().sqrt())
        raise AssertionError(
            f"{name} {tuple(actual.shape)}: max error {float(error.max()):.3e} at {where}, RMS {rms:.3e}, "
            f"allowed {allowed:.3e} (rtol {rtol:g})"
        )


def assert_trees_close(actual: Tree, expected: Tree, name: str = "state", rtol: float = 1e-10) -> None:
    """`assert_close` for every floating tensor of a state tree; integer tensors and constants must be equal."""
    ours, skeleton = flatten(actual)
    theirs, other = flatten(expected)
    if skeleton != other:
        raise AssertionError(f"{name}: structure {skeleton}, expected {other}")
    for path, tensor in ours.items():
        assert_close(tensor, theirs[path], f"{name}.{path}", rtol if tensor.is_floating_point() else 0.0)


def gradcheck64(function: Callable[..., Any], *inputs: Tensor) -> None:
    """`torch.autograd.gradcheck` in float64 for every floating input; raises with torch's report."""
    made = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.autograd.gradcheck(function, made, atol=1e-7, rtol=1e-6)


def random_loss(outputs: Sequence[Tensor], seed: int = 0) -> Tensor:
    """A fixed random projection of all outputs to one number, so that every output entry has its own gradient."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs)
    return sum((y * w.to(y)).sum() for y, w in zip(outputs, weights, strict=True))  # type: ignore[return-value]


def chunk_equals_loop(
    chunk: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    rtol: float = 1e-10,
    **options: Any,
) -> None:
    """Both forms give the same outputs, final state and gradient of every input.

    Both are called as f(**inputs, **options) and return tensors; the loss touches every entry of every output, the
    final state included.
    """
    results = []
    for form in (chunk, reference):
        made = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        outputs = form(**made, **options)
        gradients = torch.autograd.grad(random_loss(outputs), list(made.values()), materialize_grads=True)
        results.append((outputs, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a, b, "output" if i == 0 else f"state[{i - 1}]", rtol)
    for name, a, b in zip(inputs, our_gradients, their_gradients, strict=True):
        assert_close(a, b, f"d loss / d {name}", rtol)


def state_roundtrip(
    layer: Callable[..., tuple[Tensor, Tree]], x: Tensor, cuts: Sequence[int], rtol: float = 1e-10
) -> None:
    """y, state = layer(x, state): cutting x (B, T, D) at `cuts` gives the outputs and the state of one call."""
    whole, end = layer(x, None)
    borders = [0, *cuts, x.shape[1]]
    state, pieces = None, []
    for start, stop in zip(borders, borders[1:], strict=False):
        piece, state = layer(x[:, start:stop], state)
        pieces.append(piece)
    assert_close(torch.cat(pieces, dim=1), whole, f"output cut at {list(cuts)}", rtol)
    assert_trees_close(state, end, f"state cut at {list(cuts)}", rtol)
