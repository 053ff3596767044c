"""Steps of our optimizers beside torch's, on the matrices of a Transformer.

A row's `ratio` is its time over that of its baseline in the same rounds: AdamW(foreach=True) for what is element-wise,
torch.optim.Muon for Muon and M3, and for what is made of matrix products those products alone. The gate takes a few
steps in float64, one parameter at a time, and wants the same change of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestling import optim
from nestling.bench.measure import Work, side_by_side
from nestling.bench.verify import distance
from nestling.ops import dispatch

Make = Callable[..., torch.optim.Optimizer]
EXACT, HALF = 1e-4, 3e-2  # allowed change against float64; the second for Newton-Schulz in bfloat16 (ops README)


@dataclass(frozen=True)
class StepCase:
    """An optimizer, what its step is timed against, and how far its change may be from float64's."""

    make: Make
    against: str
    allowed: float = EXACT


def _m3(params: list[nn.Parameter], **more: Any) -> optim.M3:
    return optim.M3(params, slow=((10, 0.9, 0.2),), **more)


STEPS: dict[str, StepCase] = {
    "Momentum": StepCase(lambda ps, **more: optim.Momentum(ps, 1e-3, **more), "AdamW"),
    "PreconditionedMomentum, diagonal": StepCase(lambda ps, **m: optim.PreconditionedMomentum(ps, 1e-3, **m), "AdamW"),
    "DeltaMomentum, scalar": StepCase(lambda ps, **m: optim.DeltaMomentum(ps, 1e-3, erase="scalar", **m), "AdamW"),
    "DeltaMomentum, right": StepCase(lambda ps, **more: optim.DeltaMomentum(ps, 1e-3, **more), "products of an erase"),
    "Muon": StepCase(lambda ps, **more: optim.Muon(ps, **more), "torch Muon", HALF),
    "M3": StepCase(_m3, "torch Muon", HALF),
    "DeepMomentum": StepCase(lambda ps, foreach=None: optim.DeepMomentum(ps, 1e-3), "AdamW"),
}
BASELINES: dict[str, Make] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, foreach=True),
    "torch Muon": lambda ps: torch.optim.Muon(ps),
}


def matrices(dim: int, depth: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """The hidden matrices of `depth` blocks, with gradients: qkv, out, up, down."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, columns in ((3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)) * depth:
        p, g = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
        made.append(nn.Parameter(p.to(device, dtype)))
        made[-1].grad = g.to(device, dtype)
    return made


def steps(
    *, dim: int = 256, depth: int = 4, steps: int = 20, repeats: int = 5, device: str = "cpu", cases: Any = STEPS
) -> list[dict[str, Any]]:
    """Time per step and bytes of state per parameter; the median over rounds of `steps` steps each."""
    gates = {name: gate(case, device) for name, case in cases.items()}
    rows = [{"name": name, "gate": why} for name, why in gates.items() if why]
    made = {name: make(matrices(dim, depth, torch.float32, device)) for name, make in BASELINES.items()}
    made |= {
        name: case.make(matrices(dim, depth, torch.float32, device)) for name, case in cases.items() if not gates[name]
    }
    works: dict[str, Work] = {name: times(optimizer.step, steps) for name, optimizer in made.items()}
    works |= {name: times(work, steps) for name, work in products(matrices(dim, depth, torch.float32, device)).items()}
    seconds = {name: t.median / steps for name, t in side_by_side(works, repeats=repeats, device=device).items()}
    for name in works:
        against = cases[name].against if name in cases else name
        row = {"name": name, "against": against, "seconds_per_step": seconds[name], "gate": "green"}
        row |= {"ratio": seconds[name] / seconds[against], "steps": steps, "dim": dim, "depth": depth}
        rows.append(row | ({"bytes_per_parameter": state_bytes(made[name])} if name in made else {}))
    return rows


def times(work: Work, count: int) -> Work:
    """The work `count` times."""

    def repeated() -> None:
        for _ in range(count):
            work()

    return repeated


def products(params: list[nn.Parameter]) -> dict[str, Work]:
    """What the optimizers made of products cannot do without: Newton-Schulz one by one, and m G^T G."""
    grads = [p.grad for p in params if p.grad is not None]
    dtype = dispatch.newton_schulz_dtype(grads[0].device)

    def erases() -> None:
        for g in grads:
            (g @ g.mT) @ g if g.shape[0] <= g.shape[1] else g @ (g.mT @ g)

    def orthogonal_factors() -> None:
        for g in grads:
            dispatch.newton_schulz(g.to(dtype))

    return {"products of an erase": erases, "Newton-Schulz": orthogonal_factors}


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes kept per parameter, the clocks aside."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = sum(x.numel() * x.element_size() for p in params for x in tensors(optimizer.state[p]) if x.dim())
    return found / sum(p.numel() for p in params)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a state, wherever they lie in it."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [x for part in parts for x in tensors(part)]


def gate(case: StepCase, device: str = "cpu", count: int = 4) -> str | None:
    """None where a few steps change small matrices as float64 does, one at a time, else what differs."""
    changes = []
    for dtype, options in ((torch.float32, {}), (torch.float64, {"foreach": False})):
        params = matrices(16, 1, dtype, device)
        start = [p.detach().clone() for p in params]
        try:
            times(case.make(params, **options).step, count)()
        except (RuntimeError, ValueError) as raised:
            return f"{type(raised).__name__}: {' '.join(str(raised).split())}"
        changes.append([p.detach() - q for p, q in zip(params, start, strict=True)])
    for i, (a, b) in enumerate(zip(*changes, strict=True)):
        if not distance(a, b) <= case.allowed:
            return f"the change of matrix {i} is off by {distance(a, b):.1e}, allowed {case.allowed:.0e}"
    return None
