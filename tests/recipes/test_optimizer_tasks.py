"""The protocol of the comparison: widened sweeps, steps for equal time, verdicts, and what is measured of a run."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from nestling import optim
from recipes import learning_tasks, optimizer_tasks
from recipes.learning_tasks import Problem
from recipes.optimizer_tasks import LIBRARY_RATE, compared, numbers_kept, rise, steps_of, sweep, training
from recipes.optimizer_zoo import FADE, ZOO


def test_a_sweep_is_widened_until_the_best_rate_lies_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def cell(best: float) -> Any:
        return lambda task, name, rate, seed, steps, folder: {
            "validation loss": None if rate > 1 else abs(math.log(rate / best))
        }

    default = ZOO["AdamW"].default
    for best, count in ((default, 3), (default * 3, 4), (default * 9, 5), (default / 9, 5)):
        monkeypatch.setattr(optimizer_tasks, "train_cell", cell(best))
        losses = sweep("mlp", "AdamW", None)
        assert len(losses) == count and list(losses) == sorted(losses)
        assert optimizer_tasks.best_rate(losses) == pytest.approx(best)
        assert min(losses) < optimizer_tasks.best_rate(losses) < max(losses)
    monkeypatch.setattr(optimizer_tasks, "train_cell", cell(10.0))
    assert math.inf in sweep("mlp", "SGD-momentum", None).values()  # a divergence ends the widening


def test_equal_time_gives_a_slower_optimizer_fewer_steps() -> None:
    times = dict.fromkeys(ZOO, 2.0) | {"AdamW": 1.0, "SGD-momentum": 0.5}
    assert set(steps_of("mlp", "equal steps", times).values()) == {600}
    made = steps_of("mlp", "equal time", times)
    assert (made["AdamW"], made["SGD-momentum"], made["M3"]) == (600, 1200, 300)


def test_verdicts() -> None:
    assert compared([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], True)["verdict"] == "better"
    assert compared([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], False)["verdict"] == "worse"
    assert compared([1.0, 3.0, 1.2], [2.0, 2.1, 2.3], True)["verdict"] == "no difference shown"
    assert compared([1.0, None, 1.2], [2.0, 2.1, 2.3], True)["verdict"] == "diverged"


def test_rise_is_one_for_a_steady_fall_and_sees_a_spike() -> None:
    falling = [2 - 0.01 * i for i in range(100)]
    assert rise(falling) == 1
    assert rise([*falling, *[4.0] * 10, *falling]) == pytest.approx(4 / (2 - 0.01 * 94.5))


@pytest.mark.parametrize(
    "name, kept",
    [("AdamW", 2), ("SGD-momentum", 1), ("DeltaMomentum", 1), ("DGD", 0), ("Muon", 1), ("M3", 4)],
)
def test_numbers_kept_are_counted_in_the_state(name: str, kept: int) -> None:
    """For a net of hidden matrices, but for what goes to AdamW: biases and the head."""
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False), nn.Linear(30, 1, bias=False))
    optimizer = ZOO[name].make(model, 1e-3)
    model(torch.randn(4, 30)).square().mean().backward()
    optimizer.step()
    inner, head = 1800, 30
    adamw = 2 if name in ("Muon", "M3") else kept
    assert numbers_kept(optimizer, model) == pytest.approx((kept * inner + adamw * head) / (inner + head))


def test_training_follows_the_schedule_and_fades() -> None:
    """Without gradients only the fading is left: the product of what the schedule leaves."""
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    problem = Problem(model, lambda: model(torch.zeros(1, 3)).sum() * 0, lambda part: {})
    rates = []
    for optimizer, _ in training(problem, ZOO["SGD-momentum"].make, 0.1, 40):
        rates.append(optimizer.param_groups[0]["lr"] / 0.1)
    assert max(rates) == 1 and rates[-1] == pytest.approx(0) and rates[0] == 0.5
    left = math.prod(1 - FADE * r for r in rates)
    torch.testing.assert_close(model.weight.detach(), before * left)


def test_the_rate_at_which_m3_must_be_stable_is_the_librarys() -> None:
    for made in (optim.M3, optim.param_groups):
        assert inspect.signature(made).parameters["lr"].default == LIBRARY_RATE


@pytest.mark.parametrize("task", ["transformer", "hope"])
def test_text_problems_have_equal_sizes_data_and_levels_that_write(task: str) -> None:
    first, again = (learning_tasks.TASKS[task].start(1, 2, None) for _ in range(2))
    assert sum(p.numel() for p in first.model.parameters()) == pytest.approx(131_136, rel=0.02)
    assert first.loss().item() == again.loss().item()
    assert all(period * 4 <= learning_tasks.STREAM * learning_tasks.LENGTH for period in learning_tasks.PERIODS)
