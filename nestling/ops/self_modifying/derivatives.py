"""What every backward pass that is written out shares: when it is needed, and what it does when differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Given = tuple[Any, ...]  # tensors, or None where there is none


def learns(*tensors: Tensor | None) -> bool:
    """Whether autograd watches a function of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable(plain: Callable[..., Given], options: tuple[Any, ...], tensors: Given, grads: Given) -> Given:
    """The gradients of plain(*options, *tensors) as autograd records them: they can be differentiated again."""
    alias = [None if t is None else t.view_as(t) for t in tensors]  # cuts the tensors' own history off
    wanted = [a for a in alias if a is not None and a.requires_grad]
    results = zip(plain(*options, *alias), grads, strict=True)
    outputs, outer = zip(*((y, g) for y, g in results if y is not None and y.requires_grad), strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, outer, create_graph=True, allow_unused=True))
    return tuple(next(found) if a is not None and a.requires_grad else None for a in alias)
