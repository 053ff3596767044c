"""Delta gradient descent: a step that first forgets what the weights said about the present inputs, (54)-(57).

    W <- argmin <grad, W> + erase/2 mean |W x|^2 + |W - W_t|^2 / (2 lr)       the mean over the inputs x of the layer
       = (W_t - lr grad) (I + lr erase mean(x x^T))^-1

With one input this is (57) with eta' = lr / (1 + lr |x|^2). It needs the inputs of every layer, which no p.grad holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nestling.core.spread import is_spread, whole
from nestling.optim.base import Group, Optimizer, State
from nestling.optim.layer_inputs import Keys, Observer, keys_of
from nestling.optim.sharded import part_like, shard_group, total


class DGD(Optimizer):
    """Delta gradient descent for the weights of Linear, Embedding and Conv1d-3d layers; plain gradient descent for
    all other parameters (biases, norms, and those whose name matches a pattern in `plain`). With `only`, it writes no
    parameters but these, given with their names.

    Attributes:
        exact: solve for the argmin, in the smaller of inputs and input dimensions. False is the first-order form
            W (I - eta' mean(x x^T)) - eta' grad with eta' = lr / (1 + lr erase mean |x|^2): stable for any inputs, and
            the same for one input.
        erase: 1 is the paper's objective, 0 is SGD. The erase is a decay of W along its inputs: where W should hold
            the minimum of the loss, choose it small.
        reduction: "mean" if the loss is a mean over samples, "sum" if it is a sum: then the erase is a sum too.

    Gradients accumulate over several backward passes, with their inputs, until `step` or `zero_grad`; between them
    at most min(inputs, dims) x dims numbers are kept per weight. A weight shared by layers of one kind meets the
    inputs of all. Inputs are met when the gradient of their weight is computed, by `torch.autograd.grad` too: call
    zero_grad after that.

    Raises ValueError for a weight shared by layers of different kinds (an embedding and a head), for a gradient of a
    layer that never ran as a module (the out_proj of nn.MultiheadAttention), and where several processes train
    without FSDP2. With it, the inputs of all processes count: per weight and step their Gram matrix is summed, and
    each process writes its own rows (embeddings and grouped convolutions are gathered, one at a time). FSDP2 has to
    be there before the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        exact: bool = True,
        weight_decay: float = 0.0,
        *,
        erase: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        plain: Sequence[str] = (),
        only: Sequence[tuple[str, Tensor]] | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction is {reduction!r}; use "mean" or "sum", as the loss does')
        self.reduction = reduction
        written = list(model.named_parameters()) if only is None else list(only)
        self.keys, handles = observe(model, plain, {p for _, p in written})
        self.remove_hooks = weakref.finalize(self, remove, handles)  # also when the optimizer is gone
        defaults = {"lr": lr, "exact": exact, "weight_decay": weight_decay, "erase": erase}
        super().__init__(model.parameters() if only is None else written, defaults, foreach=False)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not group["erase"] >= 0:
            raise ValueError(f"erase is {group['erase']}; use a number >= 0")

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        for p, g in zip(params, grads, strict=True):
            g = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g
            keys = self.keys.get(p)
            if keys is not None and is_spread(p):
                keys.pool(p, partial(total, like=p))  # type: ignore[arg-type]
            if keys is None or not self.met(keys, p):
                p.sub_(g, alpha=group["lr"])
            elif keys.by_rows and shard_group(p) is not None:
                self.write(p.to_local(), g.to_local(), keys, group)  # type: ignore[attr-defined]
            elif is_spread(p):
                made = whole(p)
                self.write(made, whole(g), keys, group)
                p.copy_(part_like(made, p))
            else:
                self.write(p, g, keys, group)

    def write(self, p: Tensor, g: Tensor, keys: Keys, group: Group) -> None:
        """Write a weight, or some rows of it, in place."""
        if p.numel():
            dtype = torch.promote_types(p.dtype, torch.float32)
            W, G = keys.fold(p).to(dtype), keys.fold(g).to(dtype)
            p.copy_(keys.unfold(self.written(W, G, keys, group), p))

    def written(self, W: Tensor, G: Tensor, keys: Keys, group: Group) -> Tensor:
        """The memory W (G, K, V) after a step along the gradient G."""
        strength = group["erase"] / (keys.count if self.reduction == "mean" else 1)
        if group["exact"]:
            moved = W - group["lr"] * G
            return moved - keys.erased(moved, group["lr"] * strength)
        rate = group["lr"] / (1 + group["lr"] * strength * keys.trace())
        return W - rate * (G + strength * keys.gram_times(W))

    def met(self, keys: Keys, p: Tensor) -> bool:
        """Whether the layer ran; a gradient without any inputs is refused."""
        if keys.count == 0 and bool(whole(p.grad).any()):  # type: ignore[arg-type]
            raise ValueError(
                f"a weight of shape {tuple(p.shape)} has a gradient, but DGD saw no inputs of its layer (it is used "
                "outside its module, or the hooks were removed); name it in plain=[...] for plain gradient descent"
            )
        return keys.count > 0

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Write every parameter that has a gradient, and forget the inputs met."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1 and not all(is_spread(p) for p in self.keys):
                raise ValueError(
                    f"{processes} processes train, and DGD sees the inputs of one; use fully_shard (FSDP2) before "
                    "making the optimizer, or one process"
                )
        loss = super().step(closure)
        self.forget_inputs()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the inputs they belong to."""
        super().zero_grad(set_to_none)
        self.forget_inputs()

    def forget_inputs(self) -> None:
        """Drop what was met since the last step."""
        for keys in self.keys.values():
            keys.clear()


def observe(
    model: nn.Module, plain: Sequence[str], among: set[Tensor]
) -> tuple[dict[Tensor, Keys], list[RemovableHandle]]:
    """Hooks on every layer with a weight `among` these whose keys are known; the keys by weight."""
    keys: dict[Tensor, Keys] = {}
    names: dict[Tensor, str] = {}
    handles = []
    for path, module in model.named_modules():
        for own, p in module._parameters.items():
            name = f"{path}.{own}" if path else own
            if p is None or p not in among or any(fnmatchcase(name, pattern) for pattern in plain):
                continue
            made = keys_of(module) if own == "weight" else None
            if p in names and type(keys.get(p)) is not type(made):
                raise ValueError(
                    f"weight {name} is shared with {names[p]}, a layer of another kind, and has two sorts of keys; "
                    f"untie them, or pass plain=[{names[p]!r}, {name!r}] for plain gradient descent"
                )
            names.setdefault(p, name)
            if made is not None:
                hook = Observer(keys.setdefault(p, made))
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return keys, handles


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Take the hooks off."""
    for handle in handles:
        handle.remove()
