"""Every optimizer of torch.optim as associative memories of gradients: what each keeps, by which rule, for how long.

An optimizer writes the weights on the step clock, and keeps memories of its own that it writes on the same clock:
momentum is a linear memory without values that decays (paper (33)), Adam's two moments solve an L2 regression
element by element and share one level (paper (100)-(105)), Muon reads its momentum through Newton-Schulz (paper (42)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
Sizes = Callable[[Tensor], list[int]]  # the sizes of the tensors kept for one parameter

SURPRISE = "⟨W x, ∂L/∂y⟩"  # a step of size η minimises it with ‖W − W_t‖²/2η (paper (9), (29)-(31))
GRADIENTS = "⟨m, g⟩: value-less, compresses gradients"
SQUARES = "⟨m, g²⟩: value-less, compresses squared gradients"


def one_like(parameter: Tensor) -> list[int]:
    """One tensor of the parameter's size."""
    return [parameter.numel()]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One memory that an optimizer keeps for the parameters of a group."""

    name: str
    keys: tuple[str, ...]  # where it lies in optimizer.state[parameter]
    memory: str
    objective: str
    rule: str
    half_life: float | None  # steps, at the current hyper-parameters; None = does not decay
    sizes: Sizes = one_like
    whole_group: bool = False  # kept once for all parameters as one vector, under the first, not once for each
    period: float = 1  # steps between writes


@dataclass(frozen=True, kw_only=True)
class Description:
    """How an optimizer writes the weights of one group, and what it keeps in order to."""

    rule: str
    half_life: float | None  # of an undisturbed weight, in steps; None = does not decay, or not at a fixed rate
    kept: tuple[Kept, ...] = ()
    period: float = 1  # steps between writes of the weights


# Entries of an optimizer's state that are clocks or scratch, not memories of gradients.
COUNTERS = {"step", "eta", "mu", "mu_product", "n_iter", "func_evals", "t", "prev_loss", "al"}


def half_life(kept: float) -> float | None:
    """Steps until what is multiplied by `kept` at every step has halved; None if it never does."""
    if kept >= 1:
        return None
    return 0.0 if kept <= 0 else math.log(2) / -math.log(kept)


def ema(name: str, key: str, beta: float, of: str, objective: str) -> Kept:
    """An exponential moving average: a diagonal linear memory that keeps `beta` of itself at every write."""
    rule = f"m ← {beta:g} m + {1 - beta:.4g} {of}"
    return Kept(
        name=name, keys=(key,), memory="diagonal linear memory", objective=objective, rule=rule,
        half_life=half_life(beta),
    )  # fmt: skip


def momentum(beta: float, added: float = 1.0) -> Kept:
    """Classical momentum: a linear memory without values that decays."""
    rule = f"m ← {beta:g} m + {f'{added:g} ' if added != 1 else ''}g"
    return Kept(
        name="momentum", keys=("momentum_buffer",), memory="linear memory", objective=GRADIENTS, rule=rule,
        half_life=half_life(beta),
    )  # fmt: skip


def first_step(beta: float) -> Kept:
    return ema("first moment", "exp_avg", beta, "g", GRADIENTS)


def second_step(beta: float) -> Kept:
    return ema("second moment", "exp_avg_sq", beta, "g²", SQUARES)


def coupled(rule: str, group: Group) -> str:
    """The rule with the L2 penalty that enters the gradient, if there is one."""
    return f"{rule}, g + {group['weight_decay']:g} W for g" if group.get("weight_decay") else rule


def decoupled(rule: str, group: Group) -> str:
    """The rule with decay applied to the weights themselves, if there is any."""
    return f"{rule}, W decays by η·{group['weight_decay']:g}" if group.get("weight_decay") else rule


def rate(group: Group) -> float:
    return float(group["lr"])


def sgd(group: Group) -> Description:
    beta, added = float(group["momentum"]), 1 - float(group["dampening"])
    gain = added / (1 - beta) if 0 < beta < 1 else 1.0
    rule = "W ← W − η (g + β m)" if group["nesterov"] else "W ← W − η m" if beta else "W ← W − η g"
    return Description(
        rule=coupled(rule, group),
        half_life=half_life(1 - rate(group) * group["weight_decay"] * gain),
        kept=(momentum(beta, added),) if beta else (),
    )


def adam(group: Group) -> Description:
    beta1, beta2 = map(float, group["betas"])
    kept = [first_step(beta1), second_step(beta2)]
    if group["amsgrad"]:
        largest = "m ← max(m, second moment)"
        kept.append(
            Kept(
                name="largest second moment",
                keys=("max_exp_avg_sq",),
                memory="diagonal memory",
                objective=SQUARES,
                rule=largest,
                half_life=None,
            )  # fmt: skip
        )
    rule = "W ← W − η m̂₁ / (√m̂₂ + ε): element-wise L2 regression"
    separate = bool(group.get("decoupled_weight_decay", False))
    return Description(
        rule=decoupled(rule, group) if separate else coupled(rule, group),
        half_life=half_life(1 - rate(group) * group["weight_decay"]) if separate else None,
        kept=tuple(kept),
    )


def rescaled(group: Group, first: str) -> Description:
    """Adam with another reading of its first moment."""
    beta1, beta2 = map(float, group["betas"])
    rule = f"W ← W − η {first} / (√m̂₂ + ε)"
    separate = bool(group["decoupled_weight_decay"])
    return Description(
        rule=decoupled(rule, group) if separate else coupled(rule, group),
        half_life=half_life(1 - rate(group) * group["weight_decay"]) if separate else None,
        kept=(first_step(beta1), second_step(beta2)),
    )


def nadam(group: Group) -> Description:
    return rescaled(group, "(Nesterov mix of m̂₁ and g)")


def radam(group: Group) -> Description:
    return rescaled(group, "r_t m̂₁")


def adamax(group: Group) -> Description:
    beta1, beta2 = map(float, group["betas"])
    largest = Kept(
        name="largest gradient", keys=("exp_inf",), memory="diagonal memory", objective="max of |g|, decaying",
        rule=f"m ← max({beta2:g} m, |g| + ε)", half_life=half_life(beta2),
    )  # fmt: skip
    return Description(rule=coupled("W ← W − η m̂₁ / m∞", group), half_life=None, kept=(first_step(beta1), largest))


def sparse_adam(group: Group) -> Description:
    beta1, beta2 = map(float, group["betas"])
    return Description(
        rule="W ← W − η m̂₁ / (√m̂₂ + ε), only where g has entries",
        half_life=None,
        kept=(first_step(beta1), second_step(beta2)),
    )


def adagrad(group: Group) -> Description:
    total = Kept(
        name="sum of squares", keys=("sum",), memory="diagonal linear memory", objective=SQUARES, rule="m ← m + g²",
        half_life=None,
    )  # fmt: skip
    return Description(rule=coupled("W ← W − η_t g / (√m + ε)", group), half_life=None, kept=(total,))


def adadelta(group: Group) -> Description:
    rho = float(group["rho"])
    kept = (
        ema("second moment", "square_avg", rho, "g²", SQUARES),
        ema("second moment of updates", "acc_delta", rho, "ΔW²", "⟨m, ΔW²⟩: value-less"),
    )
    return Description(rule=coupled("W ← W − η g √(m_Δ + ε) / √(m₂ + ε)", group), half_life=None, kept=kept)


def rmsprop(group: Group) -> Description:
    alpha, beta = float(group["alpha"]), float(group["momentum"])
    kept = [ema("second moment", "square_avg", alpha, "g²", SQUARES)]
    kept += [ema("mean gradient", "grad_avg", alpha, "g", GRADIENTS)] if group["centered"] else []
    normalised = "g / √(m₂ − m₁²)" if group["centered"] else "g / √m₂"
    if beta:
        kept.append(Kept(**vars(momentum(beta)) | {"rule": f"m ← {beta:g} m + {normalised}"}))
    rule = "W ← W − η m" if beta else f"W ← W − η {normalised}"
    return Description(rule=coupled(rule, group), half_life=None, kept=tuple(kept))


def rprop(group: Group) -> Description:
    down, up = group["etas"]
    last = Kept(
        name="last gradient", keys=("prev",), memory="diagonal memory", objective="equals the last gradient",
        rule="m ← g", half_life=0.0,
    )  # fmt: skip
    size = Kept(
        name="step size", keys=("step_size",), memory="diagonal memory", objective="agreement of successive signs",
        rule=f"m ← m × {up:g} or {down:g}, bounded", half_life=None,
    )  # fmt: skip
    return Description(rule="W ← W − sign(g) m", half_life=None, kept=(last, size))


def asgd(group: Group) -> Description:
    average = Kept(
        name="average of weights", keys=("ax",), memory="diagonal linear memory", objective="½‖m − W‖²",
        rule=f"m ← W until step {group['t0']:g}, then the running mean of W", half_life=None,
    )  # fmt: skip
    return Description(
        rule=coupled(f"W ← (1 − {group['lambd']:g} η_t) W − η_t g", group), half_life=None, kept=(average,)
    )


def muon(group: Group) -> Description:
    beta = float(group["momentum"])
    kept = Kept(**vars(ema("momentum", "momentum_buffer", beta, "g", GRADIENTS)) | {"memory": "matrix memory"})
    read = "g + β (m − g)" if group["nesterov"] else "m"
    return Description(
        rule=decoupled(f"W ← W − η NewtonSchulz_{group['ns_steps']}({read})", group),
        half_life=half_life(1 - rate(group) * group["weight_decay"]),
        kept=(kept,),
    )


def adafactor(group: Group) -> Description:
    def rows_and_columns(p: Tensor) -> list[int]:
        return [p.numel() // p.shape[-1], p.numel() // p.shape[-2]] if p.dim() > 1 else [p.numel()]

    kept = 1 - (float(group.get("steps_taken", 0)) + 1) ** float(group["beta2_decay"])
    factors = Kept(
        name="factored second moment", keys=("row_var", "col_var", "variance"), memory="rank-1 memory",
        objective=SQUARES, rule=f"m ← (1 − t^{group['beta2_decay']:g}) m + t^{group['beta2_decay']:g} mean(g²)",
        half_life=half_life(kept), sizes=rows_and_columns,
    )  # fmt: skip
    return Description(
        rule=decoupled("W ← W − η_t clip(g / √(m_row m_col / mean m_row))", group),
        half_life=half_life(1 - rate(group) * group["weight_decay"]),
        kept=(factors,),
    )


def lbfgs(group: Group) -> Description:
    pairs = int(group["history_size"])
    window = Kept(
        name="curvature pairs", keys=("old_dirs", "old_stps", "ro"), memory="sliding window", half_life=None,
        objective="secant equations: H (g' − g) = W' − W", rule=f"keep the last {pairs} pairs; non-parametric read",
        sizes=lambda p: [p.numel()] * (2 * pairs) + [1] * pairs, whole_group=True,
    )  # fmt: skip
    last = Kept(
        name="last direction and gradient", keys=("d", "prev_flat_grad", "H_diag"), memory="vectors", half_life=0.0,
        objective="equal the last ones", rule="m ← d, g", whole_group=True,
        sizes=lambda p: [p.numel(), p.numel(), 1],
    )  # fmt: skip
    rule = f"W ← W − η H g, up to {group['max_iter']} times in a step"
    return Description(rule=rule, half_life=None, kept=(window, last))


ENTRIES: dict[type[torch.optim.Optimizer], Callable[[Group], Description]] = {
    torch.optim.ASGD: asgd,
    torch.optim.Adadelta: adadelta,
    torch.optim.Adafactor: adafactor,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adam: adam,  # AdamW is a subclass
    torch.optim.Adamax: adamax,
    torch.optim.LBFGS: lbfgs,
    torch.optim.Muon: muon,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Rprop: rprop,
    torch.optim.SGD: sgd,
    torch.optim.SparseAdam: sparse_adam,
}


def describe(optimizer: torch.optim.Optimizer, group: Group) -> Description | None:
    """The entry of the optimizer's class, or of the nearest class it derives from; None if it is unknown."""
    for kind in type(optimizer).__mro__:
        if kind in ENTRIES:
            return ENTRIES[kind](group)
    return None
