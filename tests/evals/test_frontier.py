"""The frontier: nothing gained without writes, interpolation by hand, and what the control is."""

import json
import math

import pytest
import torch

from nestling.evals import (
    Curve,
    Point,
    Setting,
    chosen_rate,
    differences_over_seeds,
    frontier,
    gains_over_seeds,
    read_text,
    reconfigured,
    settings,
)
from tests.evals.small_models import model, text

SETTING = Setting(name="by hand", periods=(16.0, 32.0), ratios=(1.0, 0.5))


def curve(*points: tuple[float, float]) -> Curve:
    """A curve through (forgetting, gain) points."""
    made = tuple(Point(rate=i + 1.0, forgetting=f, gain=g) for i, (f, g) in enumerate(points))
    return Curve(setting=SETTING, points=made, frozen=2.0, domain=1.5)


def test_interpolation_by_hand() -> None:
    found = curve((0.4, 4.0), (1.4, 6.0), (3.0, 5.0))
    assert found.gain_at(0.2) == pytest.approx(2.0)  # from the origin: no writes, no gain
    assert found.gain_at(0.9) == pytest.approx(5.0)
    assert found.gain_at(1.4) == pytest.approx(6.0)
    assert found.gain_at(2.2) == pytest.approx(5.5)
    assert found.gain_at(3.1) is None
    assert found.best_within(2.2) == pytest.approx(6.0)
    assert found.best_within(10.0) == pytest.approx(6.0)
    assert curve((0.1, -3.0)).best_within(1.0) == 0.0  # not to learn is always possible


def test_forgetting_may_fall_before_it_rises() -> None:
    found = curve((-0.5, 3.0), (1.5, 7.0))
    assert found.gain_at(0.5) == pytest.approx(5.0)
    assert found.best_within(0.0) == pytest.approx(4.0)  # where the line from (-0.5, 3) crosses 0


def test_no_rate_no_gain() -> None:
    found = frontier(model(), text(200), text(25, rows=4, seed=9), [0.0], SETTING)
    assert found.points[0].gain == pytest.approx(0.0, abs=1e-4)
    assert found.points[0].forgetting == pytest.approx(0.0, abs=1e-9)


def test_points_are_what_reading_gives() -> None:
    reader, tokens, windows = model(), text(300), text(25, rows=4, seed=9)
    found = frontier(reader, tokens, windows, [0.1, 0.02], SETTING)
    assert [p.rate for p in found.points] == [0.02, 0.1]
    by_hand = read_text(model(inner_lr=(0.1, 0.05)), tokens).nats(0.5)
    assert found.points[1].gain == pytest.approx(100 * (1 - by_hand / found.frozen), rel=1e-4)
    assert found.points[1].gain != pytest.approx(found.points[0].gain, rel=1e-3)
    assert json.loads(json.dumps(found.to_dict()))["points"][1]["gain"] == found.points[1].gain


def test_stops_once_too_much_is_forgotten() -> None:
    windows = text(25, rows=4, seed=9)
    found = frontier(model(), text(200), windows, [0.01, 0.02, 0.04], SETTING, stop_at=-1e9)
    assert [p.rate for p in found.points] == [0.01]


def test_reconfigured_keeps_the_weights() -> None:
    reader = model()
    other = reconfigured(reader, periods=(16.0, 16.0), inner_lr=(0.1, 0.2))
    assert other.config.periods == (16.0, 16.0)
    assert other.config.inner_lr == (0.1, 0.2)
    assert reader.config.periods == (16, 32)
    for (name, a), (_, b) in zip(reader.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="keep sizes and levels"):
        reconfigured(reader, periods=(16.0,))


def test_learned_rates_give_way() -> None:
    learned = reconfigured(model(inner_learned=True), inner_lr=0.3)
    assert not learned.config.inner_learned
    assert not [name for name, _ in learned.named_parameters() if "log_rate" in name]


def test_settings_and_their_control() -> None:
    several, one, control = settings((256, 1024, 4096, math.inf), (1.0, 2.0, 4.0, 0.0))
    assert several.periods == (256, 1024, 4096, math.inf)
    assert one.periods == control.periods == (256, 256, 256, math.inf)
    assert one.ratios == (1.0, 1.0, 1.0, 1.0)
    assert control.ratios == (1.0, 0.5, 0.25, 0.0)
    per_token = [[r / p for r, p in zip(s.ratios, s.periods, strict=True)] for s in (several, control)]
    assert per_token[0] == pytest.approx(per_token[1])
    assert several.rates(0.1) == pytest.approx((0.1, 0.2, 0.4, 0.0))
    with pytest.raises(ValueError, match="1 ratios for 2 periods"):
        Setting(name="x", periods=(16.0, 32.0), ratios=(1.0,))


def test_over_seeds() -> None:
    a, b = [curve((1.0, g)) for g in (5.0, 6.0, 7.0)], [curve((1.0, g)) for g in (4.0, 5.0, 6.0)]
    gains, difference = gains_over_seeds(a, 1.0), differences_over_seeds(a, b, 1.0)
    assert gains is not None
    assert difference is not None
    assert (gains.mean, gains.n) == (6.0, 3)
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert gains_over_seeds([*a, curve((0.5, 9.0))], 1.0) is None
    assert differences_over_seeds(a, [*b[:2], curve((0.5, 9.0))], 1.0) is None


def test_a_changed_kappa_brings_its_own_metric() -> None:
    """The metric is a function of the old keys and of kappa; weights that are loaded bring only the keys."""
    calibrated = model(inner_kappa=100.0)
    calibrated.calibrate(text(200))
    changed = reconfigured(calibrated, inner_kappa=3.0)
    again = model(inner_kappa=3.0)
    again.calibrate(text(200))
    metrics = {n: b for n, b in changed.named_buffers() if n.endswith("inner_metric")}
    assert metrics
    for name, metric in metrics.items():
        assert torch.equal(metric, again.get_buffer(name)), name
        assert not torch.equal(metric, calibrated.get_buffer(name)), name


def test_the_chosen_rate_is_the_largest_that_is_safe_on_average() -> None:
    a, b = (
        curve((0.2, 4.0), (1.2, 6.0), (3.0, 7.0)),
        curve((0.3, 4.0), (0.6, 5.0)),
    )  # b stopped early: rates 1 and 2 only
    assert chosen_rate([a.points, b.points], 1.0) == 2.0  # (1.2 + 0.6) / 2 < 1
    assert chosen_rate([a.points, b.points], 0.8) == 1.0
    with pytest.raises(ValueError, match="add smaller rates"):
        chosen_rate([a.points, b.points], 0.1)
