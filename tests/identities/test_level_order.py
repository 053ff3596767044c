"""Definition 2: sorting boxes by frequency is a strict weak order."""

import itertools
import math

from nestling.core.level import Level, Levels


def box(name: str, period: float, clock: str = "step") -> Level:
    return Level(name=name, memory="m", objective="o", rule="r", clock=clock, period=period, parameters=0)


BOXES = [box(f"{c}{p}{i}", p, c) for c in ("token", "step") for p in (0, 1, 16, math.inf) for i in range(2)]


def test_strict_weak_order():
    for a, b, c in itertools.product(BOXES, repeat=3):
        assert not a.is_faster_than(a)
        assert not (a.is_faster_than(b) and b.is_faster_than(a))
        assert not (a.is_faster_than(b) and b.is_faster_than(c)) or a.is_faster_than(c)
        tied = not a.is_faster_than(b) and not b.is_faster_than(a)
        assert not (tied and a.is_faster_than(c)) or b.is_faster_than(c)


def test_a_new_frequency_never_changes_the_order_of_the_others():
    before = [x.name for x in Levels(BOXES)]
    after = [x.name for x in Levels([*BOXES, box("new", 7)]) if x.name != "new"]
    assert before == after


def test_adams_two_moments_are_one_level():
    groups = Levels([box("weights", 1), box("exp_avg", 1), box("exp_avg_sq", 1), box("slow", 8)]).by_frequency()
    assert [[x.name for x in group] for group in groups] == [["weights", "exp_avg", "exp_avg_sq"], ["slow"]]
