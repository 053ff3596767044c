"""Intervals over seeds: mean, 95 % t-interval, and the rule for the word "better" (no scipy needed)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4, exact up to rounding.
    """
    if df < 1:
        raise ValueError(f"df={df} must be at least 1; an interval needs two values")
    angle = math.atan2(t, math.sqrt(df))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = df % 2
    term, total = (cos if odd else 1.0), 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= cos * cos * (power + 1) / (power + 2)
    inside = 2 / math.pi * (angle + sin * total) if odd else sin * total
    return 0.5 + inside / 2


def t_quantile(p: float, df: int) -> float:
    """The value below which Student's t lies with probability p, by bisection of `t_cdf`."""
    if not 0 < p < 1:
        raise ValueError(f"p={p} must lie between 0 and 1, e.g. 0.975")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over n values and its t-interval; the bounds are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and 0 lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g} (n={self.n}, no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t-interval of independent values, one per seed. Raises ValueError without values."""
    n = len(values)
    if n == 0:
        raise ValueError("values is empty; give one value per seed")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean=mean, low=None, high=None, n=1, level=level)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t_quantile((1 + level) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n, level=level)


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of a - b, seed by seed."""
    if len(a) != len(b):
        raise ValueError(f"paired: {len(a)} and {len(b)} values do not pair; give both for the same seeds")
    return interval([x - y for x, y in zip(a, b, strict=True)], level)


def verdict(difference: Interval, *, smaller_is_better: bool = True) -> str:
    """What may be said of a, given the interval of a - b: "better", "worse" or "no difference shown"."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "better" if (difference.mean < 0) == smaller_is_better else "worse"
