"""The frontier: gain on a text that is read against forgetting of the training domain, over rates of the writes.

Periods only count if they beat the control: one period everywhere, with the same write length per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from nestling.evals.reading import domain_loss, forgetting, gain_percent, read_text
from nestling.evals.statistics import Interval, interval
from nestling.models import LanguageModel, from_config

FORGETTING = (0.5, 1.0, 2.0, 5.0)  # percent at which gains are compared


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Periods, and the rate of each level in units of the rate on the grid."""

    name: str
    periods: tuple[float, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ratios) != len(self.periods):
            raise ValueError(
                f"setting {self.name!r}: {len(self.ratios)} ratios for {len(self.periods)} periods; give one each"
            )

    def rates(self, rate: float) -> tuple[float, ...]:
        """`inner_lr` at a rate of the grid."""
        return tuple(rate * ratio for ratio in self.ratios)


def settings(periods: Sequence[float], ratios: Sequence[float] | None = None) -> tuple[Setting, Setting, Setting]:
    """The periods as given, one period (the shortest) at equal rates, and the control.

    The control writes every level at the shortest period with the same rate per token as the first setting, that is
    each rate times shortest / period. Frozen levels (inf) stay frozen in all three.
    """
    given = tuple(ratios) if ratios is not None else (1.0,) * len(periods)
    shortest = min(periods)
    alone = tuple(p if math.isinf(p) else shortest for p in periods)
    writable = sum(math.isfinite(p) for p in periods)
    same = tuple(r if math.isinf(p) else r * shortest / p for p, r in zip(periods, given, strict=True))
    return (
        Setting(name=f"{writable} periods", periods=tuple(periods), ratios=given),
        Setting(name="one period", periods=alone, ratios=(1.0,) * len(periods)),
        Setting(name="one period, same rates per token", periods=alone, ratios=same),
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rate: percent gained on the second half of the text, percent forgotten."""

    rate: float
    gain: float
    forgetting: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The frontier of one model and setting. Losses in nats per token; points by rising rate, rate 0 left out."""

    setting: Setting
    points: tuple[Point, ...]
    frozen: float  # on the second half of the text
    domain: float  # on the training domain, before reading

    def path(self) -> list[tuple[float, float]]:
        """(forgetting, gain) from no writes at all, by rising rate."""
        return [(0.0, 0.0), *((p.forgetting, p.gain) for p in self.points)]

    def gain_at(self, percent: float) -> float | None:
        """Gain where the rising rate first forgets `percent`, by lines between points; None if none forgets so much."""
        for (f0, g0), (f1, g1) in zip(self.path(), self.path()[1:], strict=False):
            if f0 < percent <= f1:
                return g0 + (percent - f0) / (f1 - f0) * (g1 - g0)
        return None

    def best_within(self, percent: float) -> float:
        """The largest gain met before the rising rate forgets more than `percent`; 0 = do not learn."""
        best = 0.0
        for forgotten, gain in self.path():
            if forgotten > percent:
                return max(best, self.gain_at(percent) or 0.0)
            best = max(best, gain)
        return best

    def to_dict(self) -> dict[str, Any]:
        gains = {f"{f:g}": self.gain_at(f) for f in FORGETTING}
        return asdict(self) | {"gain_at": gains, "best_within": {f"{f:g}": self.best_within(f) for f in FORGETTING}}


def reconfigured(model: LanguageModel, **changes: Any) -> LanguageModel:
    """The same weights under a changed config. Learned rates give way to the ones in the config.

    Raises ValueError where the change needs other weights, such as another number of levels.
    """
    if "inner_lr" in changes:
        changes = {"inner_learned": False} | changes
    like = next(model.parameters())
    made = from_config(replace(model.config, **changes)).to(like.device, like.dtype)
    weights = {name: w for name, w in model.state_dict().items() if not name.endswith("inner_log_rate")}
    missing = {name for name in made.state_dict() if name not in weights and not name.endswith("inner_log_rate")}
    unknown = [name for name in weights if name not in made.state_dict()]
    wrong = sorted(missing) + unknown
    if wrong:
        raise ValueError(f"the weights do not fit {changes}: {wrong[0]} is in one of both only; keep sizes and levels")
    made.load_state_dict(weights, strict=False)
    return made.train(model.training)


def frontier(
    model: LanguageModel,
    text: Tensor,
    windows: Tensor,
    rates: Sequence[float],
    setting: Setting,
    *,
    stop_at: float = math.inf,
    call_size: int = 4096,
) -> Curve:
    """Read `text` (1, T) at each rate; measure the gain over the frozen model, and forgetting on `windows` (n, L + 1).

    Args:
        rates: the grid, in any order. setting: periods and the ratios of the levels' rates.
        stop_at: leave out larger rates once one forgets more than this, in percent.
    """
    still = reconfigured(model, periods=setting.periods, inner_lr=0.0)
    frozen = read_text(still, text, learn=False, call_size=call_size)
    domain = domain_loss(still, windows)
    points: list[Point] = []
    for rate in sorted(rates):
        reader = reconfigured(model, periods=setting.periods, inner_lr=setting.rates(rate))
        learning = read_text(reader, text, call_size=call_size)
        lost = forgetting(reader, learning.state, windows, before=domain).percent
        points.append(Point(rate=rate, gain=gain_percent(learning, frozen), forgetting=lost))
        if lost > stop_at:
            break
    return Curve(setting=setting, points=tuple(points), frozen=frozen.nats(0.5), domain=domain)


def chosen_rate(curves: Sequence[Sequence[Point]], limit: float) -> float:
    """The largest rate that all curves have whose mean forgetting over the curves stays below `limit` percent.

    Choose on texts other than the one that will be reported. Raises ValueError where no rate of the grid is so safe.
    """
    shared = set.intersection(*({p.rate for p in points} for points in curves)) if curves else set()

    def lost(rate: float) -> float:
        return sum(p.forgetting for points in curves for p in points if p.rate == rate) / len(curves)

    safe = [rate for rate in shared if lost(rate) < limit]
    if not safe:
        raise ValueError(f"limit={limit}: every rate of {sorted(shared)} forgets more on average; add smaller rates")
    return max(safe)


def gains_over_seeds(curves: Sequence[Curve], percent: float) -> Interval | None:
    """Gain at a forgetting of `percent` over the models of several seeds; None unless every curve reaches it."""
    gains = [gain for curve in curves if (gain := curve.gain_at(percent)) is not None]
    return interval(gains) if curves and len(gains) == len(curves) else None


def differences_over_seeds(a: Sequence[Curve], b: Sequence[Curve], percent: float) -> Interval | None:
    """Interval of the paired difference of gains a - b at a forgetting; None unless every curve reaches it."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} curves do not pair; give both for the same seeds")
    pairs = [(x.gain_at(percent), y.gain_at(percent)) for x, y in zip(a, b, strict=True)]
    known = [x - y for x, y in pairs if x is not None and y is not None]
    return interval(known) if pairs and len(known) == len(pairs) else None
