"""The optimizers of nestling.optim as associative memories of gradients; the entries beside those of torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestling import optim
from nestling.introspect.optimizers import (
    GRADIENTS,
    SQUARES,
    Description,
    Group,
    Kept,
    coupled,
    decoupled,
    ema,
    half_life,
    momentum,
    rate,
)
from nestling.optim.base import matrix

REGRESSION = "½‖m Gᵀ + P‖²: what m said about these inputs makes room"


def faded(group: Group) -> float | None:
    """Half-life of weights with decoupled decay."""
    return half_life(1 - rate(group) * group["weight_decay"])


def renamed(kept: Kept, **changes: Any) -> Kept:
    """The same memory with some of what is said about it changed."""
    return Kept(**vars(kept) | changes)


def plain_momentum(optimizer: optim.Momentum, group: Group) -> Description:
    beta = float(group["momentum"])
    gain = 1 / (1 - beta)
    return Description(
        rule=coupled("W ← W − η (g + β m)" if group["nesterov"] else "W ← W − η m", group),
        half_life=half_life(1 - rate(group) * group["weight_decay"] * gain),
        kept=(momentum(beta),),
    )


def of_preconditioner(made: optim.Preconditioner) -> tuple[Kept, ...]:
    """The memories that a preconditioner keeps."""
    if isinstance(made, optim.Diagonal):
        return (ema("second moment", "second_moment", made.beta, "g²", SQUARES),)
    if not isinstance(made, optim.Kronecker):
        return ()

    def factors(p: Tensor) -> list[int]:
        return [n * n for n in made.sides(p).values()]

    moments = ema("Kronecker factors", "left", made.beta, "G Gᵀ, GᵀG", "⟨m, G Gᵀ⟩: value-less")
    roots = Kept(
        name="inverse roots", keys=("left_root", "right_root"), memory="matrix memory", half_life=0.0, sizes=factors,
        objective="equal the factors' inverse roots", rule="m ← m^(−1/4), of one factor m^(−1/2)", period=made.period,
    )  # fmt: skip
    rest = ema("second moment of vectors", "second_moment", made.rest.beta, "g²", SQUARES)
    return (
        renamed(moments, keys=("left", "right"), memory="matrix memory", sizes=factors),
        roots,
        renamed(rest, sizes=lambda p: [] if made.sides(p) else [p.numel()]),
    )


def preconditioned(optimizer: optim.PreconditionedMomentum, group: Group) -> Description:
    beta = float(group["momentum"])
    stored = renamed(momentum(beta), rule=f"m ← {beta:g} m + P(g)", objective="⟨m Gᵀ, P⟩: P under a gradient")
    kept = (stored, *of_preconditioner(optimizer.preconditioner))
    return Description(rule=decoupled("W ← W − η m", group), half_life=faded(group), kept=kept)


def delta_momentum(optimizer: optim.DeltaMomentum, group: Group) -> Description:
    beta, side = float(group["momentum"]), group["erase"]
    g = "Ĝ" if group["normalize"] else "G"
    erased = {"right": f"m {g}ᵀ{g}", "left": f"{g} {g}ᵀm", "scalar": f"|{g}|² m"}[side]
    rule = f"m ← {beta:g} m − {group['erase_rate']:g} {erased} + P(G)"
    stored = renamed(momentum(beta), rule=rule, objective=REGRESSION)
    kept = (stored, *of_preconditioner(optimizer.preconditioner))
    return Description(rule=decoupled("W ← W − η m", group), half_life=faded(group), kept=kept)


def dgd(optimizer: optim.DGD, group: Group) -> Description:
    solved = "W ← (W − η g)(I + η e x xᵀ)⁻¹" if group["exact"] else "W ← W (I − η' e x xᵀ) − η' g"
    rule = f"{solved} with e = {group['erase']:g}, mean over the layer's inputs x"
    return Description(rule=coupled(rule, group), half_life=None)


def generalised(optimizer: optim.Generalised, group: Group) -> Description:
    form, beta = optimizer.form, float(group.get("momentum", 1.0))
    kept = Kept(
        name="memory", keys=("memory",), memory=type(form.memory(1, 1)).__name__, objective=form.objective.name,
        rule=f"keeps {beta:g} of itself, one step on its objective", half_life=half_life(beta),
        sizes=lambda p: [x.numel() for x in optimizer.empty(matrix(p)).values()],
    )  # fmt: skip
    last = Kept(
        name="last gradient", keys=("last",), memory="matrix memory", objective="equals the last gradient",
        rule="m ← g / rms(g)", half_life=0.0,
    )  # fmt: skip
    keeps_last = "last" in form.reading.init(torch.zeros(1, 1))
    return Description(
        rule=decoupled("W ← W − η σ(m(g))", group),
        half_life=faded(group),
        kept=(kept, last) if keeps_last else (kept,),
    )


def muon(optimizer: optim.Muon, group: Group) -> Description:
    beta = float(group["momentum"])
    read = "g + β (m − g)" if group["nesterov"] else "m"
    kept = renamed(ema("momentum", "momentum_buffer", beta, "g", GRADIENTS), memory="matrix memory")
    rule = decoupled(f"W ← W − η NewtonSchulz_{group['ns_steps']}({read})", group)
    return Description(rule=rule, half_life=faded(group), kept=(kept,))


def m3(optimizer: optim.M3, group: Group) -> Description:
    beta, second = group["betas"]
    kept = [accumulated("momentum", "momentum_buffer", beta, "g", group)]
    kept += [accumulated("second moment", "second_moment", second, "g²", group)] if second is not None else []
    for k, (period, slow, alpha) in enumerate(group["slow"]):
        memory = accumulated(f"slow momentum {k}", f"slow_{k}", slow, "its period's gradients", group)
        life = None if memory.half_life is None else period * memory.half_life
        early = group["horizon"] is not None and not group["literal"]
        rule = f"{memory.rule}, at first over the last {group['horizon']:g} of the steps" if early else memory.rule
        kept.append(renamed(memory, half_life=life, rule=rule))
        kept.append(
            Kept(
                name=f"slow direction {k}",
                keys=(f"slow_{k}_orthogonal",),
                memory="matrix memory",
                half_life=0.0,
                objective="equals the orthogonal factor",
                rule=f"m ← NewtonSchulz(slow momentum {k}), read × {alpha:g}",
                period=period,
            )  # fmt: skip
        )
    total = " + ".join(["NS(m)", *(f"{alpha:g} NS(s_{k})" for k, (_, _, alpha) in enumerate(group["slow"]))])
    scaled = f"({total}) / (√v + ε)" if second is not None else f"({total})"
    rule = decoupled(f"W ← W − η {scaled}{'' if group['literal'] else ', as long as NS(m)'}", group)
    return Description(rule=rule, half_life=faded(group), kept=tuple(kept))


def accumulated(name: str, key: str, beta: float, of: str, group: Group) -> Kept:
    """A mean that fades, or Algorithm 1's sum that does not."""
    made = renamed(
        ema(name, key, beta, of, SQUARES if of == "g²" else GRADIENTS),
        memory="diagonal memory" if of == "g²" else "matrix memory",
    )
    return renamed(made, rule=f"m ← m + {beta:g} {of}", half_life=None) if group["literal"] else made


ENTRIES: dict[type[torch.optim.Optimizer], Callable[[Any, Group], Description]] = {
    optim.DGD: dgd,
    optim.DeltaMomentum: delta_momentum,
    optim.Generalised: generalised,  # DeepMomentum is a subclass
    optim.M3: m3,
    optim.Momentum: plain_momentum,
    optim.Muon: muon,
    optim.PreconditionedMomentum: preconditioned,
}


def describe(optimizer: torch.optim.Optimizer, group: Group) -> Description | None:
    """The entry of the optimizer's class or of one it derives from; None if it is not ours."""
    for kind in type(optimizer).__mro__:
        if kind in ENTRIES:
            return ENTRIES[kind](optimizer, group)
    return None


def slowed(made: Description, period: float) -> Description:
    """The same optimizer as a level of MultiLevel that steps once in `period` steps, and collects in between."""
    if period == 1:
        return made

    def later(life: float | None) -> float | None:
        return None if life is None or math.isinf(period) else life * period

    waiting = Kept(
        name="collected gradients", keys=("accumulated",), memory="linear memory", objective=GRADIENTS,
        rule=f"m ← m + g, handed over every {period:g} steps", half_life=None,
    )  # fmt: skip
    kept = [renamed(memory, period=memory.period * period, half_life=later(memory.half_life)) for memory in made.kept]
    return Description(
        rule=made.rule,
        half_life=later(made.half_life),
        kept=(*kept, waiting) if math.isfinite(period) else tuple(kept),
        period=period,
    )
