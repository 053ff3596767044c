"""Momentum is a linear memory of gradients that decays; what it stores under a gradient, and what it erases there.

    Momentum                 m <- alpha m + G                          <m G^T, I>       (33), (34)
    PreconditionedMomentum   m <- alpha m + P(G)                       <m G^T, P>       (46), (47)
    DeltaMomentum            m <- m (alpha I - erase G^T G) + P(G)     1/2 |m G^T + P|^2  (48), (49)

each with W <- W - lr m. The paper writes m in units of the step (lr inside m); outside it, as in torch.optim.SGD, a
schedule changes the next step and not the memory. For a constant lr both are the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nestling.optim.base import Group, Optimizer, Params, State, decay_weights, matrix
from nestling.optim.preconditioners import Diagonal, Given, Preconditioner

Side = Literal["right", "left", "scalar"]
PLAIN = Given(lambda g: g)


class Momentum(Optimizer):
    """m <- momentum m + g, W <- W - lr m: a linear memory without values that decays, (33). Equals torch.optim.SGD.

    With nesterov the weights move along g + momentum m. weight_decay is an L2 penalty: it enters the gradient, and so
    the memory, as in torch.optim.SGD.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, foreach)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_momentum(group["momentum"])

    def init(self, p: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        m = [state["momentum_buffer"] for state in states]
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, grads)
        read = torch._foreach_add(grads, m, alpha=group["momentum"]) if group["nesterov"] else m
        torch._foreach_add_(params, list(read), alpha=-group["lr"])


class PreconditionedMomentum(Optimizer):
    """m <- momentum m + P(g), W <- W - lr m: the memory stores what P makes of a gradient, (46), (47).

    P is `Diagonal()`, `Kronecker()` or `Given(mapping)`. weight_decay is decoupled: W fades by lr weight_decay.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.9,
        preconditioner: Preconditioner | None = None,
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        self.preconditioner = Diagonal() if preconditioner is None else preconditioner
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, foreach)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_momentum(group["momentum"])

    def init(self, p: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(p), **self.preconditioner.init(p)}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        decay_weights(params, group)
        m = [state["momentum_buffer"] for state in states]
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, self.preconditioner(grads, states))
        torch._foreach_add_(params, m, alpha=-group["lr"])


class DeltaMomentum(Optimizer):
    """m <- m (momentum I - erase_rate G^T G) + P(G), W <- W - lr m: what m said about these inputs makes room, (49).

    `erase` is the side that the erase acts on, for a parameter read as (out, in): "right" (arXiv) the inputs, "left"
    (NeurIPS) the outputs, "scalar" all of m by |G|^2. erase_rate = 0 is Momentum. `normalize` takes G / |G| in the
    erase, so that every eigenvalue of what is kept lies in [momentum - erase_rate, momentum]; then "scalar" is
    Momentum with momentum - erase_rate. normalize=False with erase_rate = lr is the printed form with the rate that
    print omits, and diverges once erase_rate sigma^2 > 1 + momentum.

    Cost: two products of m with G, 4 numel min(out, in) multiplications and additions; "scalar" none.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.9,
        erase: Side = "right",
        *,
        erase_rate: float = 0.1,
        normalize: bool = True,
        preconditioner: Preconditioner = PLAIN,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        self.preconditioner = preconditioner
        defaults = {"lr": lr, "momentum": momentum, "erase": erase, "erase_rate": erase_rate, "normalize": normalize}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, foreach)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_momentum(group["momentum"])
        if group["erase"] not in ("right", "left", "scalar"):
            raise ValueError(
                f'erase is {group["erase"]!r}; use "right", "left" or "scalar", and erase_rate=0 to erase nothing'
            )
        top = 1 + group["momentum"] if group["normalize"] else float("inf")
        if not 0 <= group["erase_rate"] < top:
            raise ValueError(
                f"erase_rate is {group['erase_rate']}, momentum {group['momentum']}: what is kept grows unless "
                f"0 <= erase_rate < {top}; use at most momentum"
            )

    def init(self, p: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(p), **self.preconditioner.init(p)}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        decay_weights(params, group)
        m = [state["momentum_buffer"] for state in states]
        values = self.preconditioner(grads, states)
        keep_erased(m, grads, group)
        torch._foreach_add_(m, values)
        torch._foreach_add_(params, m, alpha=-group["lr"])


def keep_erased(m: list[Tensor], grads: list[Tensor], group: Group) -> None:
    """m <- m (momentum I - erase_rate G^T G) on the group's side, in place."""
    rates = [erase_rate(g, group) for g in grads]
    if group["erase"] == "scalar":
        torch._foreach_mul_(m, [group["momentum"] - r * g.square().sum() for r, g in zip(rates, grads, strict=True)])
        return
    erased = [erased_part(x, g, group["erase"]).mul_(r) for x, g, r in zip(m, grads, rates, strict=True)]
    torch._foreach_mul_(m, group["momentum"])
    torch._foreach_sub_(m, erased)


def erase_rate(g: Tensor, group: Group) -> Tensor | float:
    """The rate in front of G^T G; a gradient of zeros erases nothing, normalised or not."""
    if not group["normalize"]:
        return float(group["erase_rate"])
    return group["erase_rate"] / g.square().sum().clamp_min(torch.finfo(g.dtype).tiny)


def erased_part(m: Tensor, g: Tensor, side: Side) -> Tensor:
    """m G^T G or G G^T m, the products in the cheaper order."""
    M, G = matrix(m), matrix(g)
    outputs, inputs = G.shape
    if side == "left":
        erased = (G @ G.mT) @ M if outputs <= inputs else G @ (G.mT @ M)
    else:
        erased = (M @ G.mT) @ G if outputs <= inputs else M @ (G.mT @ G)
    return erased.reshape(m.shape)


def check_momentum(momentum: float) -> None:
    """Raise ValueError unless a memory that keeps this part of itself forgets."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; use 0 <= momentum < 1")
