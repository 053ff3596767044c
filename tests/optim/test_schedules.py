import pytest
import torch

from nestling.optim import schedules


def test_warmup_cosine():
    f = schedules.warmup_cosine(4, 11, final=0.1)
    assert [f(t) for t in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert f(4) == 1.0 and f(7) == pytest.approx(0.55) and f(10) == pytest.approx(0.1) == f(50)


def test_warmup_stable_decay_and_linear():
    f = schedules.warmup_stable_decay(2, 20, decay=5)
    assert [f(0), f(1), f(10), f(15)] == [0.5, 1.0, 1.0, 1.0]
    assert f(17) == pytest.approx(0.5) and f(19) == 0.0 == f(99)
    assert [schedules.linear(5, 0.5)(t) for t in range(6)] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.5])


def test_scale_is_a_function_of_the_step_alone():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([p], lr=0.2, weight_decay=0.4)
    for step in (3, 0, 1):
        schedules.scale(optimizer, step, lr=schedules.warmup_cosine(4, 9), weight_decay=schedules.linear(5))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="'beta' is no hyper-parameter of AdamW: .*lr"):
        schedules.scale(optimizer, 0, beta=schedules.linear(5))


@pytest.mark.parametrize(
    "make", [lambda: schedules.warmup_cosine(5, 5), lambda: schedules.warmup_stable_decay(2, 5, 4)]
)
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match="warmup is 5, steps is 5|decay is 4; use 1 ... 3"):
        make()
