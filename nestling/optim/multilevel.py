"""MultiLevel: memories of gradients that write the weights at different periods of the step clock.

A level is an optimizer and a period. At every step each level takes the gradients in; only when its period is full it
steps, with their mean: what is written seldom is written from more data. This is the continuum memory system of (70)
and (71) for parameters, with any optimizer as the rule of a level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from nestling.optim.base import Group, restore_dtypes
from nestling.optim.dgd import DGD


class MultiLevel(torch.optim.Optimizer):
    """Several optimizers as one, each stepping when its own period of the step clock is full.

        MultiLevel({"fast": (AdamW(vectors), 1), "slow": (M3(matrices), 8)})

    A level of period P collects the gradients of P steps and then steps once with their mean, as if its batch were P
    times as large; its rate is that of its optimizer at that step. Period inf never writes. With all periods 1 it is
    the optimizers themselves, equal bits. param_groups and state are those of the levels, so schedules, clipping,
    GradScaler and checkpoints see one optimizer; each group carries its level, period and clock, and what is collected
    lies in the state as "accumulated" (in the gradient's dtype): a resumed run goes on with equal bits.
    Raises ValueError for no level, a period below 1 or between integers, LBFGS, and DGD with a period above 1.
    """

    def __init__(self, levels: Mapping[str, tuple[torch.optim.Optimizer, float]]) -> None:
        if not levels:
            raise ValueError('levels is empty; use e.g. {"all": (torch.optim.AdamW(model.parameters()), 1)}')
        for name, (optimizer, period) in levels.items():
            check(name, optimizer, period)
            for group in optimizer.param_groups:
                group |= {"level": name, "level_period": period, "level_clock": 0}
        self.optimizers = {name: optimizer for name, (optimizer, _) in levels.items()}
        super().__init__([group for optimizer in self.optimizers.values() for group in optimizer.param_groups], {})
        for optimizer in self.optimizers.values():
            self.state.update(optimizer.state)
        self.link()

    def link(self) -> None:
        """Let every level work on our groups and our state, so that there is one of each."""
        if {group.get("level") for group in self.param_groups} != set(self.optimizers):
            raise ValueError(f"the state is not one of a MultiLevel with the levels {', '.join(self.optimizers)}")
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups = [group for group in self.param_groups if group["level"] == name]
            optimizer.state = self.state

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the level that it names, at that level's period and clock."""
        if param_group.get("level") not in self.optimizers:
            raise ValueError(
                f"level of the group is {param_group.get('level')!r}; use one of {', '.join(self.optimizers)}"
            )
        groups = self.optimizers[param_group["level"]].param_groups
        if not any(param_group is group for group in groups):
            param_group |= {key: groups[0][key] for key in ("level_period", "level_clock")}
            self.optimizers[param_group["level"]].add_param_group(param_group)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.link()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and what is kept keeps its dtype."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step; what slow levels have collected stays."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One tick of the step clock; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["level_clock"] += 1
            period, clock = (optimizer.param_groups[0][key] for key in ("level_period", "level_clock"))
            if period == 1:
                optimizer.step()
            elif math.isfinite(period):
                self.collect(optimizer)
                if clock % period == 0:
                    self.write(optimizer, period)
        return loss

    def collect(self, optimizer: torch.optim.Optimizer) -> None:
        """Add this step's gradients to what the level waits to write."""
        for p in parameters(optimizer):
            if p.grad is not None:
                total = self.state[p].get("accumulated")
                self.state[p]["accumulated"] = p.grad.clone() if total is None else total.add_(p.grad)

    def write(self, optimizer: torch.optim.Optimizer, period: float) -> None:
        """Step with the mean of the period. What was collected leaves the state: optimizers start in an empty one."""
        now = [(p, p.grad) for p in parameters(optimizer)]
        for p, _ in now:
            total = self.state[p].pop("accumulated", None) if p in self.state else None
            p.grad = None if total is None else total.div_(period)
        optimizer.step()
        for p, grad in now:
            p.grad = grad

    def __repr__(self) -> str:
        """A table of the levels."""
        rows = [("level", "optimizer", "period", "lr", "tensors", "parameters")]
        for name, optimizer in self.optimizers.items():
            params, group = parameters(optimizer), optimizer.param_groups[0]
            size, period = sum(p.numel() for p in params), f"{group['level_period']:g}"
            rows.append(
                (name, type(optimizer).__name__, period, f"{float(group['lr']):g}", str(len(params)), f"{size:,}")
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check(name: str, optimizer: torch.optim.Optimizer, period: float) -> None:
    """Raise ValueError for a level that cannot be."""
    if not period >= 1 or (math.isfinite(period) and period != int(period)):
        raise ValueError(f'period of level "{name}" is {period}; use whole steps between writes, at least 1, or inf')
    if isinstance(optimizer, torch.optim.LBFGS) or (isinstance(optimizer, DGD) and period > 1):
        raise ValueError(
            f'level "{name}" is {type(optimizer).__name__} with period {period:g}: it reads more than a mean gradient; '
            "step it on its own"
        )
