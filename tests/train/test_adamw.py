"""Groups and rates of AdamW, and its state as a tree."""

import copy

import pytest
import torch
from torch import nn

from nestling.train import OptimConfig
from nestling.train.optimizer import learning_rate, load_optimizer_tree, make_optimizer, optimizer_tree, set_rate


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1, bias=False))
    model[2].weight.requires_grad_(False)
    groups = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in model.parameters() if p.requires_grad}


def test_rate_rises_and_ends_where_the_config_says():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr=0.1)
    rates = [learning_rate(step, 20, config) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))
    assert rates[11] == pytest.approx((1 + 0.1) / 2)
    assert learning_rate(1, 1, OptimConfig(lr=1.0, warmup_steps=0)) == pytest.approx(0.1)
    assert learning_rate(5, 5, OptimConfig(lr=1.0, warmup_steps=5)) == 1.0


def test_muon_orthogonalises_in_the_dtype_that_is_asked_for():
    for asked, expected in (("", None), ("bfloat16", "bfloat16")):
        made = make_optimizer(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), OptimConfig(matrices="muon", ns_dtype=asked)
        )
        assert made.optimizers["hidden matrices"].param_groups[0]["ns_dtype"] == expected


def test_state_as_a_tree_continues_bit_for_bit():
    def steps(model, optimizer, count):
        for i in range(count):
            set_rate(optimizer, 0.01 * (i + 1), OptimConfig())
            optimizer.zero_grad()
            model(torch.arange(6.0).view(2, 3)).square().sum().backward()
            optimizer.step()

    model = nn.Linear(3, 4)
    optimizer = make_optimizer(model, OptimConfig())
    steps(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = make_optimizer(twin, OptimConfig(lr=0.5))
    load_optimizer_tree(other, copy.deepcopy(optimizer_tree(optimizer)))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    steps(model, optimizer, 3)
    steps(twin, other, 3)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)
