"""ContinuumLevel: weights that are written once per period of tokens; its state, and the write itself.

One level is an associative memory: its keys are the inputs x of its linear maps, its values the errors -delta that
the task loss sends back to their outputs, its rule an `InnerRule`, its clock the tokens its sequence has read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.level import Level
from ...core.state import replace, state_class, where_rows
from .linear import FastLinear
from .matrix import FastMatrix
from .rules import InnerRule, Moments, MuonLike


@state_class
class LevelState:
    """What one level of one layer carries, per sequence. Dictionaries go by the name of the linear map.

    Attributes:
        delta: what was written so far, W + delta is in force.
        gradient: sum of the gradients since the last write.
        keys: sum of x x^T / |x|^2 since the last write (only for rules that erase).
        moments: what the direction keeps between writes.
        seen: sum of x x^T over what was read, as the slowest level of the stack knows it (only for online rules).
        pending: the same over what was read since the slowest level last wrote.
        targets: (B,) predicted tokens in `gradient`.
        clock: (B,) closed tokens since the last write.
        writes: (B,) number of writes.
        norm: (B,) length of the last write, relative to the weights.
    """

    delta: dict[str, FastMatrix]
    gradient: dict[str, FastMatrix]
    keys: dict[str, FastMatrix]
    moments: dict[str, Moments]
    seen: dict[str, Tensor]
    pending: dict[str, Tensor]
    targets: Tensor
    clock: Tensor
    writes: Tensor
    norm: Tensor


@state_class
class Observation:
    """What a segment says about one level: gradient sums and key moments by linear map, (B,) predicted tokens."""

    gradient: dict[str, FastMatrix]
    keys: dict[str, FastMatrix]
    seen: dict[str, Tensor]
    targets: Tensor


class ContinuumLevel(nn.Module):
    """A module whose `FastLinear` maps are written together once every `period` tokens.

    Its body may be a level itself, faster and on the same maps: then the weights in force are W + D_slow + D_fast, and
    the fast level's initial state is the slow level's weights (`nested_levels`).

    Args:
        body: any module (B, T, D) -> (B, T, D') that contains FastLinear maps.
        period: tokens between two writes; math.inf = a frozen level.
        rule: how it writes.
        name: shown by `levels()`.
    Raises ValueError for a period below 1, without FastLinear in the body, or for a level inside that does not fit.
    """

    def __init__(self, body: nn.Module, *, period: float, rule: InnerRule, name: str = "level") -> None:
        super().__init__()
        if not (period >= 1 and (math.isinf(period) or period == int(period))):
            raise ValueError(
                f"period={period} of {name} must be a whole number of tokens >= 1, or inf for a frozen level"
            )
        self.body, self.period, self.rule, self.name = body, period, rule, name
        self.maps = {path: m for path, m in body.named_modules() if isinstance(m, FastLinear)}
        if not self.maps:
            raise ValueError(f"{name} contains no FastLinear, so nothing in it could be written")
        if isinstance(body, ContinuumLevel):
            self._check_inside(body)
        log_rate = torch.tensor(math.log(rule.rate) if rule.rate > 0 else -math.inf)
        if rule.learned:
            self.inner_log_rate = nn.Parameter(log_rate)
        else:
            self.register_buffer("inner_log_rate", log_rate, persistent=False)
        self.register_buffer("inner_unit", torch.zeros(()))  # |W| / |usual gradient|; 0 = not calibrated
        self.inner_unit: Tensor
        self.register_load_state_dict_post_hook(_metric_of_own_kappa)

    def _check_inside(self, fast: ContinuumLevel) -> None:
        """Whether a level fits into this slower one, with which it shares the maps."""
        if not fast.writable or fast.period > self.period or (self.writable and self.period % fast.period):
            raise ValueError(
                f"period={fast.period:g} inside period={self.period:g}: the level inside writes at least as often; "
                "give a period that divides the outer one"
            )
        if fast.rule.kappa != self.rule.kappa:
            raise ValueError(
                f"kappa={fast.rule.kappa:g} inside kappa={self.rule.kappa:g}: levels on the same maps share the metric "
                "of the old keys; give both the same kappa"
            )

    @property
    def writable(self) -> bool:
        """False for a frozen level."""
        return math.isfinite(self.period)

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        return self.body(x, *more, **options)

    def initial_state(self, rows: int, device: torch.device) -> LevelState:
        """The state before the first token: nothing written, all clocks at zero."""
        count = torch.zeros(rows, dtype=torch.long, device=device)
        return LevelState(
            {}, {}, {}, {}, {}, {}, count, count, count, torch.zeros(rows, dtype=torch.float32, device=device)
        )

    def absorb(self, state: LevelState, seen: Observation, tokens: Tensor, due: Tensor) -> LevelState:
        """Close a segment of `tokens` (B,) tokens: add what it says, and write in the rows that are `due` (B,).

        `due` is on the host: nothing here waits for the device.
        """
        gradient = {n: state.gradient[n].plus(g) if n in state.gradient else g for n, g in seen.gradient.items()}
        keys = {n: state.keys[n].plus(k) if n in state.keys else k for n, k in seen.keys.items()}
        pending = {n: state.pending.get(n, 0) + s for n, s in seen.seen.items()}
        clock, targets = state.clock + tokens, state.targets + seen.targets
        full = replace(state, gradient=gradient, keys=keys, pending=pending, targets=targets, clock=clock)
        if not due.any():
            return full
        written = self._write(full)
        return written if due.all() else where_rows(due.to(clock.device), written, full)

    def _write(self, s: LevelState) -> LevelState:
        """The inner rule, on every row."""
        zero = torch.zeros_like(s.clock)
        after = replace(s, gradient={}, keys={}, targets=zero, clock=zero, writes=s.writes + 1)
        if self.rule.static or not s.gradient:
            return after
        maps = {name: self.maps[name] for name in s.gradient}
        count = s.targets.clamp_min(1).to(next(iter(maps.values())).weight.dtype)
        steps, moments = dict(s.gradient), dict(s.moments)
        share = 1 / count  # the mean over the period, applied to the lengths instead of the matrices
        if self.rule.direction is not None:
            for name, gradient in s.gradient.items():
                step, moments[name] = self.rule.direction(gradient.times(share).to_dense(), s.moments.get(name, {}))
                steps[name] = FastMatrix(dense=step)
            share = torch.ones_like(share)
        steps = {name: self._metric(step, maps[name], s.seen.get(name)) for name, step in steps.items()}
        like = next(iter(maps.values()))  # maps of one level are split alike
        norms = like.over_parts(torch.stack([step.norm() for step in steps.values()])) * share  # (maps, B)
        sizes = torch.stack([m.length() for m in maps.values()])[:, None]
        scales = self._scales(norms, sizes)
        delta = dict(s.delta)
        for name, scale in zip(steps, -scales * share, strict=True):
            old = self._erased(delta.get(name, FastMatrix()), s.keys.get(name))
            delta[name] = old.plus(steps[name], scale, keep=1 - self.rule.decay)
        length = torch.linalg.vector_norm((scales * norms).detach(), dim=0) / torch.linalg.vector_norm(sizes.detach())
        return replace(after, delta=delta, moments=moments, norm=length.float())

    def _metric(self, step: FastMatrix, m: FastLinear, seen: Tensor | None) -> FastMatrix:
        """Turn the write away from directions that old inputs use: step (I + kappa C)^-1."""
        if self.rule.kappa == 0:
            return step
        if seen is None:
            return step if m.inner_metric is None else step.times_matrix(m.inner_metric.to(m.weight.dtype))
        scale = seen.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
        old, parts = seen / scale.clamp_min(1e-30), (scale > 0).to(seen.dtype)
        if m.inner_keys is not None:  # the mean of both where both are there
            trained = m.inner_keys.to(seen.dtype)
            old = (trained + old) / (parts + (trained != 0).any()).clamp_min(1)
        eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
        return step.times_matrix(torch.linalg.inv(eye + self.rule.kappa * old))

    def _scales(self, norms: Tensor, sizes: Tensor) -> Tensor:
        """The factors (maps, B) that give steps of norms (maps, B) their length; `sizes` (maps, 1) of the weights."""
        rate, safe = self.inner_log_rate.exp(), norms.clamp_min(1e-20)  # stays finite in float32
        scales = rate.expand_as(norms)
        if self.rule.relative:
            scales = rate * torch.where(self.inner_unit > 0, self.inner_unit, sizes / safe)
        if math.isinf(self.rule.bound):  # the slope of infinity would be NaN
            return scales
        return torch.minimum(scales, self.rule.bound * sizes / safe)

    def _erased(self, delta: FastMatrix, keys: FastMatrix | None) -> FastMatrix:
        """D (I - erase K) of earlier writes; keys have unit length: their number is a trace."""
        if delta.empty or keys is None or not self.rule.erase:
            return delta
        return delta.erase(keys, self.rule.erase / keys.trace().clamp_min(1e-12))

    def remember_seen(self, state: LevelState, rows: Tensor) -> LevelState:
        """In the rows (B,) that are True, what was read since joins the old keys that later writes spare."""
        if not state.pending:
            return state
        seen = {n: state.seen.get(n, 0) + p for n, p in state.pending.items()}
        return where_rows(rows, replace(state, seen=seen, pending={}), state)

    def forget(self, state: LevelState, rows: Tensor) -> LevelState:
        """Back to the initial state in the rows (B,) that are True; the count of writes goes on."""
        fresh = self.initial_state(len(rows), rows.device)
        return where_rows(rows, replace(fresh, writes=state.writes, norm=state.norm), state)

    def check_split(self) -> None:
        """Raise ValueError if the rule reads more of a map than a part of its hidden units.

        The gradient of a unit's weights needs nothing of other units once the outputs are summed, and lengths are
        summed over the parts. What multiplies the hidden side by a matrix, or takes the map as one, needs them all.
        """
        rule = self.rule
        joins = {
            "inner_kappa": rule.kappa > 0,
            "inner_erase": rule.erase > 0,
            "inner_online": rule.online,
            "inner_learned": rule.learned,
            'inner_rule="muon"': isinstance(rule.direction, MuonLike),
        }
        if self.writable and any(joins.values()):
            named = ", ".join(name for name, there in joins.items() if there)
            raise ValueError(
                f"{self.name} writes with {named}, which joins hidden units of all ranks; "
                'use inner_kappa=0, and no erase, online, learned or "muon" rule'
            )

    def levels(self) -> list[Level]:
        """The box of this level."""
        decay, inside = self.rule.decay, isinstance(self.body, ContinuumLevel)
        memory = self.body
        while isinstance(memory, ContinuumLevel):
            memory = memory.body
        half_life = self.period * math.log(0.5) / math.log1p(-decay) if 0 < decay < 1 and self.writable else None
        return [
            Level(
                name=self.name,
                memory=type(memory).__name__,
                objective="task loss of the last period",
                rule=self.describe_rule(),
                clock="token",
                period=self.period,
                parameters=sum(p.numel() for p in self.parameters(recurse=not inside)),
                half_life=half_life,
                transfer="backpropagation",
                state_bytes=self.state_bytes(),
            )
        ]

    def describe_rule(self) -> str:
        """The inner rule in a few words."""
        if not self.writable:
            return "frozen"
        rule = self.rule
        words = [type(rule.direction).__name__ if rule.direction else "gradient"]
        words += [f"erase {rule.erase:g}"] * bool(rule.erase) + [f"decay {rule.decay:g}"] * bool(rule.decay)
        words += [f"old-key metric {rule.kappa:g}"] * bool(rule.kappa) + ["learned rate"] * rule.learned
        return ", ".join(words)

    def state_bytes(self) -> int:
        """Upper bound of the state per sequence, in float32 bytes: delta, gradients (two), moments."""
        if not self.writable:
            return 0
        matrices = 3 + {"Momentum": 1, "AdamLike": 2, "MuonLike": 1}.get(type(self.rule.direction).__name__, 0)
        squares = 2 * bool(self.rule.erase) + 3 * self.rule.online
        weights = sum(matrices * m.weight.numel() + squares * m.in_features**2 for m in self.maps.values())
        return 4 * weights * (not self.rule.static) + 8 * 5 + 4 * len(self.maps)


def _metric_of_own_kappa(level: nn.Module, _: object) -> None:
    """Loaded weights bring the old keys, and the metric of the model they come from; a level writes by its own rule."""
    assert isinstance(level, ContinuumLevel)
    for m in level.maps.values():
        m.spare_old_keys(level.rule.kappa)
