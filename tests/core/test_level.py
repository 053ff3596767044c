import math

import pytest

from nestling.core.level import Level, Levels


def level(name: str, period: float, clock: str = "token") -> Level:
    return Level(name=name, memory="m", objective="o", rule="r", clock=clock, period=period, parameters=0)


def test_levels_are_ordered_fast_to_slow_and_token_clock_first():
    levels = Levels([level("frozen", math.inf), level("adam", 1, "step"), level("slow", 64), level("attention", 0)])
    assert [x.name for x in levels] == ["attention", "slow", "frozen", "adam"]


def test_due_means_the_count_is_a_positive_multiple_of_the_period():
    levels = Levels([level("fast", 4), level("slow", 8), level("frozen", math.inf), level("step", 4, "step")])
    assert [x.name for x in levels.due(4)] == ["fast"]
    assert [x.name for x in levels.due(8)] == ["fast", "slow"]
    assert [x.name for x in levels.due(0)] == []
    assert [x.name for x in levels.due(8, "step")] == ["step"]
    assert level("attention", 0).due(0)


def test_writes_after_n_ticks():
    assert [level("x", 4).writes(n) for n in (0, 3, 4, 9)] == [0, 0, 1, 2]
    assert level("x", math.inf).writes(10**9) == 0


def test_frequency_at_both_ends():
    assert level("x", 0).frequency == math.inf
    assert level("x", math.inf).frequency == 0


def test_a_slice_is_levels_and_equal_levels_are_equal():
    levels = Levels([level("b", 2), level("a", 1)])
    assert levels[:1] == Levels([level("a", 1)])
    assert hash(levels) == hash(Levels([level("a", 1), level("b", 2)]))


@pytest.mark.parametrize("period", [-1, math.nan])
def test_impossible_period_is_named(period):
    with pytest.raises(ValueError, match='period of level "x"'):
        level("x", period)


def test_unknown_clock_is_named():
    with pytest.raises(ValueError, match="clock of level"):
        level("x", 1, "second")
