"""A piece of text that is read a second time for the outer gradient, so that nothing of the first time is kept.

With outer="sequence" the graph of a call runs through all of its segments. What it needs to be made again is small:
the mixer states at the start of each segment, and the fast weights of the time. The first pass serves the levels,
whose gradient ends at the segment's start, and is gone; the backward pass reads the segments again, last one first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.state import Tree, flatten, unflatten

Pass = Callable[[list[Tree]], tuple[Tensor, list[Tree]]]  # mixers -> loss, mixers


def replayed(first: Pass, again: Pass, mixers: list[Tree], parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tree]]:
    """`first(mixers)`, whose gradients w.r.t. mixers and parameters are those of `again(mixers)`, run when needed."""
    before, after = _Packed(mixers), _Packed(None)
    loss, *tensors = _Replay.apply(first, again, before, after, parameters, *before.tensors, *parameters)
    return loss, after.tree(tensors)


class _Packed:
    """A tree as a list of tensors and the way back."""

    def __init__(self, tree: Tree) -> None:
        named, self.skeleton = flatten(tree)
        self.names, self.tensors = list(named), list(named.values())

    def tree(self, tensors: Sequence[Tensor]) -> Any:
        return unflatten(dict(zip(self.names, tensors, strict=True)), self.skeleton)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Pass, again: Pass, before: _Packed, after: _Packed, parameters: list[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        own = tensors[: len(tensors) - len(parameters)]
        with torch.enable_grad():
            loss, mixers = first(before.tree([x.detach() for x in own]))
        after.__init__(mixers)  # type: ignore[misc]
        made = [x.detach() for x in after.tensors]
        after.tensors = []
        device = loss.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.again, ctx.before, ctx.parameters = again, before, parameters
        before.tensors = []
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(x for x in made if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return loss.detach(), *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters, device = ctx.parameters, ctx.autocast
        own = ctx.saved_tensors
        own = own[: len(own) - len(parameters)]
        own = [x.detach().requires_grad_(x.is_floating_point()) for x in own]
        with torch.enable_grad(), torch.autocast(device[0], dtype=device[1], enabled=device[2]):
            loss, mixers = ctx.again(ctx.before.tree(own))
        pairs = [(x, g) for x, g in zip([loss, *flatten(mixers)[0].values()], grads, strict=True) if g is not None]
        outputs, given = zip(*[(x, g) for x, g in pairs if x.requires_grad], strict=True)
        wanted = [x for x in own if x.requires_grad] + parameters
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return (None,) * 5 + tuple(next(found) if x.requires_grad else None for x in [*own, *parameters])
