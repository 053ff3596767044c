"""M3: momentum on several time scales, each read through Newton-Schulz, Algorithm 1 and (75).

A momentum that keeps 0.95 of itself has forgotten a gradient after some hundred steps. M3 keeps slower memories beside
it, written once per period with the gradients of that period, and moves along the sum of what they all say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.ops.newton_schulz import QUINTIC
from nestling.optim.base import Group, Params, State, decay_weights
from nestling.optim.orthogonal import MatrixOptimizer, adjusted_rate, nesterov, orthogonalize

NS_EPS = 1e-7  # a matrix of smaller norm counts as zero, as in Muon
Scale = tuple[int, float, float]  # a slow memory: period in steps, kept fraction beta, weight alpha in the step


class M3(MatrixOptimizer):
    """Multi-scale momentum Muon, for hidden matrices (`param_groups` gives the others to AdamW).

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        D = (NS(m) + sum_k alpha_k NS(s_k)) / (sqrt(v) + eps rms(sqrt(v)))      s_k as it was at its last border
        W <- (1 - lr weight_decay) W - lr' |NS(m)| D / |D|
        at the n-th border of period k:   s_k <- c s_k + (1 - c) mean of the period's gradients
                                          c = min(b_k, 1 - 1 / (horizon n)), not below 0

    `slow` lists (period, b_k, alpha_k), any number of them. A slow memory written at the end of one period is first
    read in the next, and is orthogonalised once per period. It averages over about the last `horizon` of the steps so
    far, until b_k is the shorter average; None is b_k from the start. b2 = None leaves v out, a large eps weakens it.
    lr' and nesterov are Muon's. Kept per parameter: m, v, and two tensors for each slow memory.

    literal=True is Algorithm 1 as printed: sums (m <- m + b1 g, v <- v + b2 g^2, s <- s + b3 sum g), the plain rate,
    eps as it is, and no rescaling of D. It is there for tests: the step shrinks as the scale of the loss grows and as
    1/sqrt(steps), and an entry whose gradients are small explodes.
    DEVIATION: means for sums; |NS(m)| D / |D|, so that a step is as long as Muon's whatever the scale of the loss; eps
    in units of sqrt(v), or the entries with the smallest gradients take the whole step; decoupled weight decay; the
    horizon, because early in training old gradients point where nothing is to be gained any more, and Newton-Schulz
    reads them at full length (docs/optimizers.md has the numbers). Line 3 counts the gradient at a border twice, here
    it counts once.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float | None] = (0.95, 0.999),
        slow: Sequence[Scale] = ((10, 0.9, 0.2),),
        weight_decay: float = 0.1,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 0.3,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        horizon: float | None = 0.1,
        literal: bool = False,
        ns_dtype: str | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "slow": tuple(tuple(scale) for scale in slow), "eps": eps}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "literal": literal, "horizon": horizon}
        defaults |= {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        super().__init__(params, {**defaults, "adjust_lr_fn": adjust_lr_fn}, foreach)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        fractions = [beta for beta in group["betas"] if beta is not None] + [beta for _, beta, _ in group["slow"]]
        if not all(0 <= beta <= 1 for beta in fractions):
            raise ValueError(f"betas is {group['betas']}, slow is {group['slow']}; kept fractions lie in 0 ... 1")
        if not all(period >= 1 and alpha >= 0 for period, _, alpha in group["slow"]):
            raise ValueError(f"slow is {group['slow']}; use (period >= 1, beta, alpha >= 0) for each slow memory")
        if group["horizon"] is not None and not group["horizon"] > 0:
            raise ValueError(f"horizon is {group['horizon']}; use a part of training > 0, or None for no limit")

    def init(self, p: Tensor, group: Group) -> State:
        keys = ["momentum_buffer"] + (["second_moment"] if group["betas"][1] is not None else [])
        keys += [key for k in range(len(group["slow"])) for key in slow_keys(k)]
        return {key: torch.zeros_like(p) for key in keys}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        total = [o.to(p.dtype) for o, p in zip(self.read_fast(grads, states, group), params, strict=True)]
        lengths = [size(o) for o in total]
        for k, (_, _, alpha) in enumerate(group["slow"]):
            torch._foreach_add_(total, [state[slow_keys(k)[1]] for state in states], alpha=alpha)
        if group["betas"][1] is not None:
            torch._foreach_div_(total, scales(grads, states, group))
        decay_weights(params, group)
        for p, length, D in zip(params, lengths, total, strict=True):
            if group["literal"]:
                p.add_(D, alpha=-group["lr"])
            else:
                p.addcmul_(D, length / size(D).clamp_min(tiny(p)), value=-adjusted_rate(p, group))
        for k, scale in enumerate(group["slow"]):
            write_slow(k, scale, grads, states, group)

    def read_fast(self, grads: list[Tensor], states: list[State], group: Group) -> list[Tensor]:
        """NS(m), after writing m."""
        m, beta = [state["momentum_buffer"] for state in states], group["betas"][0]
        if group["literal"]:
            torch._foreach_add_(m, grads, alpha=beta)
        else:
            torch._foreach_lerp_(m, grads, 1 - beta)
        ahead = group["nesterov"] and not group["literal"]
        return orthogonalize(nesterov(grads, m, beta) if ahead else m, group, NS_EPS)


def scales(grads: list[Tensor], states: list[State], group: Group) -> list[Tensor]:
    """sqrt(v) + eps rms(sqrt(v)), after writing v. That v starts at zero needs no correction: D is rescaled."""
    v, beta = [state["second_moment"] for state in states], group["betas"][1]
    if not group["literal"]:
        torch._foreach_mul_(v, beta)
    torch._foreach_addcmul_(v, grads, grads, value=beta if group["literal"] else 1 - beta)
    roots = list(torch._foreach_sqrt(v))
    if group["literal"]:
        torch._foreach_add_(roots, group["eps"])
    else:
        for root, x in zip(roots, v, strict=True):
            root.add_(x.mean(dtype=at_least_float(x)).sqrt() * group["eps"] + tiny(x))
    return roots


def size(x: Tensor) -> Tensor:
    """The Frobenius norm, in float32 at least."""
    return torch.linalg.vector_norm(x, dtype=at_least_float(x))


def at_least_float(x: Tensor) -> torch.dtype:
    """The dtype of x, or float32 if that is narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def tiny(x: Tensor) -> float:
    """What may stand below a fraction whose numerator is zero too."""
    return torch.finfo(x.dtype).tiny


def write_slow(k: int, scale: Scale, grads: list[Tensor], states: list[State], group: Group) -> None:
    """Add this step's share of s_k; at a border, orthogonalise it for the period to come.

    s_k decays at the first step of its period and collects from then on, which needs no second buffer: between two
    borders only what was orthogonalised at the last one is read.
    """
    period, beta, _ = scale
    memory, read = slow_keys(k)
    for step in {state["step"] for state in states}:  # one, unless a parameter has missed gradients
        now = [(state, g) for state, g in zip(states, grads, strict=True) if state["step"] == step]
        s, kept = [state[memory] for state, _ in now], kept_part(beta, -(-step // period), group)
        if (step - 1) % period == 0 and not group["literal"]:
            torch._foreach_mul_(s, kept)
        torch._foreach_add_(s, [g for _, g in now], alpha=beta if group["literal"] else (1 - kept) / period)
        if step % period == 0:
            for (state, _), o in zip(now, orthogonalize(s, group, NS_EPS), strict=True):
                state[read].copy_(o)


def kept_part(beta: float, border: int, group: Group) -> float:
    """What a slow memory keeps of itself at its n-th border."""
    horizon = group["horizon"]
    return beta if horizon is None else min(beta, max(0.0, 1 - 1 / (horizon * border)))


def slow_keys(k: int) -> tuple[str, str]:
    """Where the k-th slow memory lies in the state, and what of it is read."""
    return f"slow_{k}", f"slow_{k}_orthogonal"
