"""Intervals against tables and values worked out by hand."""

import math

import pytest

from nestling.evals import Interval, interval, paired, t_quantile, verdict
from nestling.evals.statistics import t_cdf

# two-sided 95 % points of Student's t, as printed in tables
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("df", "value"), TABLE.items())
def test_quantiles_are_those_of_the_table(df: int, value: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(value, abs=5e-4)
    assert t_quantile(0.025, df) == -t_quantile(0.975, df)


def test_closed_forms() -> None:
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-10)  # Cauchy
    a = 4 * 0.975 * 0.025
    assert t_quantile(0.975, 2) == pytest.approx(2 * 0.475 * math.sqrt(2 / a), rel=1e-10)
    assert t_quantile(0.99, 5) == pytest.approx(3.36493, abs=1e-5)
    assert t_cdf(0.0, 7) == 0.5
    assert t_cdf(1.3, 6) + t_cdf(-1.3, 6) == pytest.approx(1.0, rel=1e-14)


def test_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, so the half width is 4.3027 / sqrt 3."""
    found = interval([1.0, 2.0, 3.0])
    half = 4.302652729696142 / math.sqrt(3)
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - half, rel=1e-9)
    assert found.high == pytest.approx(2 + half, rel=1e-9)
    assert not found.excludes_zero


def test_pairs_take_out_what_the_seeds_share() -> None:
    a, b = [10.0, 20.0, 30.0], [10.9, 21.0, 31.1]
    difference = paired(a, b)
    assert difference.mean == pytest.approx(-1.0)
    assert difference.excludes_zero
    assert verdict(difference) == "better"
    assert verdict(difference, smaller_is_better=False) == "worse"
    assert verdict(paired(b, a)) == "worse"
    assert verdict(paired([1.0, 2.0], [2.0, 1.0])) == "no difference shown"


def test_one_seed_shows_nothing() -> None:
    single = interval([3.0])
    assert single == Interval(mean=3.0, low=None, high=None, n=1)
    assert verdict(single) == "no difference shown"
    assert str(single) == "3 (n=1, no interval)"


@pytest.mark.parametrize("call", [lambda: interval([]), lambda: paired([1.0], []), lambda: t_quantile(1.0, 3)])
def test_calls_without_an_answer(call) -> None:
    with pytest.raises(ValueError, match="; give|must lie"):
        call()
    with pytest.raises(ValueError, match="df=0"):
        t_cdf(1.0, 0)
