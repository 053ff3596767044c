"""MultiLevel: periods 1 are the optimizers themselves, a slow level is one step on a larger batch, inf never moves."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling import optim
from nestling.testing import assert_close


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(step):
    made = torch.Generator().manual_seed(step)
    return torch.randn(16, 5, generator=made).double(), torch.randn(16, 3, generator=made).double()


def train(model, optimizer, steps):
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def split(model):
    return [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]


def two_levels(model, slow=2, fast=1):
    matrices, vectors = split(model)
    return optim.MultiLevel({"slow": (optim.Muon(matrices), slow), "fast": (torch.optim.AdamW(vectors), fast)})


def test_all_periods_one_is_the_optimizers_themselves():
    one, other = network(), network()
    matrices, vectors = split(other)
    pair = optim.Muon(matrices), torch.optim.AdamW(vectors)
    made = train(one, two_levels(one, slow=1), range(5))
    for step in range(5):
        other.zero_grad()
        x, y = data(step)
        F.mse_loss(other(x), y).backward()
        for optimizer in pair:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(made, other.parameters(), strict=True))


@pytest.mark.parametrize("make", [lambda ps: torch.optim.SGD(ps, 0.1, 0.9), torch.optim.AdamW, optim.Muon])
def test_a_slow_level_alone_is_one_step_on_all_batches_of_its_period(make):
    one, other = network(), network()
    matrices, vectors = split(one)
    levels = {"slow": (make(matrices), 3), "frozen": (torch.optim.SGD(vectors, 0.1), math.inf)}
    made = train(one, optim.MultiLevel(levels), range(8))
    optimizer = make(split(other)[0])
    for start in (0, 3):
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*(data(start + i) for i in range(3)), strict=True))
        F.mse_loss(other(x), y).backward()
        optimizer.step()
    for p, q in zip(made, other.parameters(), strict=True):
        assert_close(p, q.detach())


def test_a_level_steps_when_it_is_due_and_frozen_never_moves():
    model = network()
    a, b, c = ([layer.weight, layer.bias] for layer in (model[0], model[2], model[4]))
    levels = {
        "a": (torch.optim.SGD(a, 0.1), 2),
        "b": (torch.optim.Adam(b), 3),
        "c": (torch.optim.SGD(c, 0.1), math.inf),
    }
    optimizer, last, moved = optim.MultiLevel(levels), [p.detach().clone() for p in model.parameters()], []
    for step in range(6):
        now = train(model, optimizer, [step])
        moved.append("".join(n for n, i in (("a", 0), ("b", 2), ("c", 4)) if not torch.equal(now[i], last[i])))
        last = now
    assert moved == ["", "a", "b", "a", "", "ab"]
    assert not [p for p in c if optimizer.state.get(p)]
    assert all(p.grad is not None for p in model.parameters())


def test_saved_in_the_middle_of_a_period_it_goes_on_with_equal_bits():
    model = network()
    optimizer = two_levels(model, slow=3)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, range(4, 9))
    again = network()
    again.load_state_dict(saved[0])
    restored = two_levels(again, slow=3)
    restored.load_state_dict(saved[1])
    assert "accumulated" in restored.state[again[0].weight]
    for p, q in zip(train(again, restored, range(4, 9)), expected, strict=True):
        assert torch.equal(p, q)


def test_a_copy_goes_on_alone():
    model = network()
    optimizer = two_levels(model)
    train(model, optimizer, range(3))
    other, copied = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    made = train(other, copied, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(train(model, optimizer, range(3, 6)), made, strict=True))


def test_a_schedule_reaches_every_level_also_after_loading():
    model = network()
    optimizer = two_levels(model)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(2))
    schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_it_prints_as_a_table():
    lines = repr(two_levels(network(), slow=4)).split("\n")
    assert [line.split() for line in lines] == [
        ["level", "optimizer", "period", "lr", "tensors", "parameters"],
        ["slow", "Muon", "4", "0.001", "3", "128"],
        ["fast", "AdamW", "1", "0.001", "3", "19"],
    ]


def test_what_cannot_be_a_level_is_refused():
    model = network()
    params = list(model.parameters())
    for period in (0, 1.5, math.nan, -2):
        with pytest.raises(ValueError, match='period of level "all" is'):
            optim.MultiLevel({"all": (torch.optim.SGD(params, 0.1), period)})
    with pytest.raises(ValueError, match="levels is empty"):
        optim.MultiLevel({})
    with pytest.raises(ValueError, match="LBFGS"):
        optim.MultiLevel({"all": (torch.optim.LBFGS(params), 1)})
    with pytest.raises(ValueError, match="DGD with period 2"):
        optim.MultiLevel({"all": (optim.DGD(model, 0.1), 2)})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.MultiLevel({"a": (torch.optim.SGD(params, 0.1), 1), "b": (torch.optim.SGD(params, 0.1), 1)})
    with pytest.raises(ValueError, match="level of the group is None; use one of slow, fast"):
        two_levels(model).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="levels slow, fast"):
        plain = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], 0.1)
        two_levels(model).load_state_dict(plain.state_dict())
