"""What the layers of a module received since the last step: the keys of their weights.

A layer's weight is a linear memory from its inputs to its outputs, in core's orientation (G, K, V): G independent
memories (convolution groups), keys of K numbers, values of V. A linear layer's keys are its inputs, a convolution's
are the patches it reads, an embedding's are one-hot. Keys are taken when a backward pass computes the gradient of the
layer's weight: forward passes, and backward passes for other tensors, leave nothing, and gradient checkpointing keeps
its savings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.rule import erased, erased_by_gram

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Keys(ABC):
    """The keys that one weight met, n of them: what DGD needs of their Gram matrix S = sum x x^T."""

    def __init__(self) -> None:
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Forget all keys."""
        self.count = 0

    @abstractmethod
    def see(self, module: nn.Module, x: Tensor) -> None:
        """Add the keys in what the module received."""

    @abstractmethod
    def pool(self, p: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Make these the keys that all processes met; `total` sums over them. p: the weight, for its shape."""
        self.count = int(total(torch.tensor(self.count, device=p.device)))

    @property
    def by_rows(self) -> bool:
        """Whether each row of the parameter is a value of its own: any part of them is written as the whole is."""
        return False

    @abstractmethod
    def fold(self, p: Tensor) -> Tensor:
        """The parameter as a memory (G, K, V)."""

    @abstractmethod
    def unfold(self, M: Tensor, p: Tensor) -> Tensor:
        """A memory in the shape of the parameter."""

    @abstractmethod
    def erased(self, M: Tensor, rate: float) -> Tensor:
        """M - (I + rate S)^-1 M."""

    @abstractmethod
    def gram_times(self, M: Tensor) -> Tensor:
        """S M."""

    @abstractmethod
    def trace(self) -> Tensor | float:
        """sum |x|^2, (G, 1, 1)."""


class MatrixKeys(Keys):
    """Keys of linear layers and convolutions: themselves while fewer than K, their Gram matrix after that."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self.rows: Tensor | None = None  # (G, N, K)
        self.gram: Tensor | None = None  # (G, K, K)

    def see(self, module: nn.Module, x: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        new = patches(module, x) if isinstance(module, CONVOLUTIONS) else x.reshape(1, -1, x.shape[-1])
        self.count += new.shape[1]
        if self.gram is None and self.count <= new.shape[2]:
            # copies: the layer's input may be overwritten once the backward pass is over
            self.rows = new.clone() if self.rows is None else torch.cat([self.rows, new], 1)
            return
        met = new if self.rows is None else torch.cat([self.rows, new], 1)
        self.gram = met.mT @ met if self.gram is None else torch.baddbmm(self.gram, met.mT, met)
        self.rows = None

    def pool(self, p: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        super().pool(p, total)
        if self.gram is None:
            width, dtype = p.shape[1:].numel(), torch.promote_types(p.dtype, torch.float32)
            zeros = torch.zeros(self.groups, width, width, dtype=dtype, device=p.device)
            self.gram = zeros if self.rows is None else self.rows.mT @ self.rows
        self.gram, self.rows = total(self.gram), None

    @property
    def by_rows(self) -> bool:
        return self.groups == 1

    def fold(self, p: Tensor) -> Tensor:
        return p.reshape(self.groups, p.shape[0] // self.groups, -1).mT

    def unfold(self, M: Tensor, p: Tensor) -> Tensor:
        return M.mT.reshape(p.shape)

    def erased(self, M: Tensor, rate: float) -> Tensor:
        if self.gram is not None:
            return erased_by_gram(M, self.gram.to(M), rate)
        return torch.zeros_like(M) if self.rows is None else erased(M, self.rows.to(M), rate)

    def gram_times(self, M: Tensor) -> Tensor:
        if self.gram is not None:
            return self.gram.to(M) @ M
        return torch.zeros_like(M) if self.rows is None else self.rows.to(M).mT @ (self.rows.to(M) @ M)

    def trace(self) -> Tensor | float:
        if self.gram is not None:
            return self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return 0.0 if self.rows is None else self.rows.square().sum((-2, -1))[:, None, None]


class TableKeys(Keys):
    """One-hot keys of an embedding: how often each row was read. The padding row is no key."""

    def clear(self) -> None:
        super().clear()
        self.counts: Tensor | None = None  # (K,)

    def see(self, module: nn.Module, x: Tensor) -> None:
        assert isinstance(module, nn.Embedding)
        index = x.flatten() if module.padding_idx is None else x[x != module.padding_idx]
        counts = torch.bincount(index, minlength=module.num_embeddings)
        self.count += len(index)
        self.counts = counts if self.counts is None else self.counts + counts

    def pool(self, p: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        super().pool(p, total)
        none = torch.zeros(len(p), dtype=torch.long, device=p.device)
        self.counts = total(none if self.counts is None else self.counts)

    def fold(self, p: Tensor) -> Tensor:
        return p[None]

    def unfold(self, M: Tensor, p: Tensor) -> Tensor:
        return M[0]

    def erased(self, M: Tensor, rate: float) -> Tensor:
        seen = rate * self.column(M)
        return seen / (1 + seen) * M

    def gram_times(self, M: Tensor) -> Tensor:
        return self.column(M) * M

    def trace(self) -> Tensor | float:
        return float(self.count)

    def column(self, M: Tensor) -> Tensor:
        """The counts as (1, K, 1)."""
        return M.new_zeros(1, M.shape[1], 1) if self.counts is None else self.counts.to(M)[None, :, None]


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a convolution (B, C, *space) as the keys of its groups, (G, B * positions, C / G * kernel)."""
    assert isinstance(module, CONVOLUTIONS)
    axes = len(module.kernel_size)
    x = x if x.dim() == axes + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i in range(axes):
        size, step, apart = module.kernel_size[i], module.stride[i], module.dilation[i]
        x = x.unfold(2 + i, (size - 1) * apart + 1, step)[..., ::apart]
    x = x.unflatten(1, (module.groups, -1))  # (B, G, C / G, *positions, *kernel)
    x = x.movedim(1, 0).movedim(2, 2 + axes)  # (G, B, *positions, C / G, *kernel)
    return x.reshape(module.groups, x.shape[1 : -1 - axes].numel(), x.shape[-1 - axes :].numel())


class Passed(torch.autograd.Function):
    """The output of a layer, unchanged; when its gradient arrives on the way to the weight, the layer's keys are taken.

    The input waits among the graph's saved tensors, so it is freed with the graph. `weight` is a view of the layer's
    weight, whose node tells whether this backward pass goes there.
    """

    @staticmethod
    def forward(output: Tensor, x: Tensor, weight: Tensor, observer: Observer, module: nn.Module) -> Tensor:
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Observer, nn.Module], output: Tensor) -> None:
        y, x, weight, ctx.observer, ctx.module = inputs
        ctx.to_weight = weight.grad_fn
        ctx.mark_dirty(y)  # not a copy and not a view: what follows may write in place
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        if torch._C._will_engine_execute_node(ctx.to_weight):
            ctx.observer.keys.see(ctx.module, x.detach())
        return gradients[0], None, None, None, None


class Observer:
    """The forward hook of one layer. A copy of the module, in memory or in a file, is not observed."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not (output.requires_grad and weight.requires_grad):
            return output
        return Passed.apply(output, args[0] if args else kwargs["input"], weight.view_as(weight), self, module)

    def __reduce__(self) -> tuple[type[Unobserved], tuple[()]]:
        return Unobserved, ()


class Unobserved:
    """The hook of a copied layer: nothing."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        return None


def keys_of(module: nn.Module) -> Keys | None:
    """Empty keys for a layer's weight; None for a module whose keys are not known."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None
    if isinstance(module, nn.Embedding):
        return TableKeys()
    if isinstance(module, CONVOLUTIONS):
        return MatrixKeys(module.groups)
    return MatrixKeys(1) if isinstance(module, nn.Linear) else None
