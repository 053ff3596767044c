import pytest
import torch

from nestling.core.objective import DotProduct, L2Regression, RobustLp, ValueLess
from nestling.testing import assert_close

OBJECTIVES = [DotProduct(), L2Regression(), RobustLp(), RobustLp(p=1.5, smoothing=1e-3), RobustLp(p=3, smoothing=0.0)]


def pair():
    return torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradient_is_that_of_the_loss(objective):
    prediction, value = pair()
    loss = objective.loss(prediction, value)
    assert loss.shape == (3, 4)
    (expected,) = torch.autograd.grad(loss.sum(), prediction)
    assert_close(objective.gradient(prediction, value), expected, str(objective))


def test_value_less_gradient_is_that_of_the_loss():
    prediction, _ = pair()
    (expected,) = torch.autograd.grad(ValueLess().loss(prediction, None).sum(), prediction)
    assert_close(ValueLess().gradient(prediction, None), expected, "value-less")


def test_lp_with_p_2_and_no_smoothing_is_l2():
    prediction, value = pair()
    lp = RobustLp(p=2, smoothing=0.0)
    assert_close(lp.loss(prediction, value), L2Regression().loss(prediction, value), "loss")
    assert_close(lp.gradient(prediction, value), L2Regression().gradient(prediction, value), "gradient")


def test_robust_lp_bounds_the_pull_of_an_outlier_and_is_finite_at_zero_error():
    zero, far = torch.zeros(1, 1), torch.full((1, 1), 1e3)
    assert RobustLp().gradient(zero, zero).item() == 0
    assert RobustLp().gradient(far, zero).item() == pytest.approx(1.0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_missing_value_is_named(objective):
    with pytest.raises(ValueError, match="value is None"):
        objective.gradient(torch.ones(1), None)


def test_a_superfluous_value_is_named():
    with pytest.raises(ValueError, match="pass None"):
        ValueLess().gradient(torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("options", [{"p": 0.5}, {"p": 1.0, "smoothing": 0.0}, {"smoothing": -1.0}])
def test_impossible_exponents_are_refused(options):
    with pytest.raises(ValueError, match="need p >= 1"):
        RobustLp(**options)
