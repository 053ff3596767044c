"""param_groups: the default assignment, patterns, and the errors that stop a typing mistake."""

import pytest
import torch
from torch import nn

from nestling import optim
from nestling.optim import Assign


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.up = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 6, bias=False)
        self.memory = nn.Parameter(torch.randn(2, 3, 3))
        self.head = nn.Linear(6, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def names(optimizer):
    """{level: names}"""
    found = {}
    for group in optimizer.param_groups:
        found.setdefault(group["level"], []).extend(group["param_names"])
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw(tied):
    optimizer = optim.param_groups(Net(tied), 2e-3)
    found = names(optimizer)
    assert found["hidden matrices"] == ["conv.weight", "up.weight", "down.weight"]
    expected = {"memory", "embedding.weight", "conv.bias", "depthwise.weight", "depthwise.bias", "up.bias"}
    expected |= {"norm.weight", "norm.bias"} | (set() if tied else {"head.weight"})
    assert set(found["the rest"]) == expected
    assert {g["lr"] for g in optimizer.param_groups} == {2e-3}
    undecayed = [name for g in optimizer.param_groups if not g["weight_decay"] for name in g["param_names"]]
    assert all(name.endswith("bias") or name.startswith("norm") for name in undecayed)
    assert [type(o) for o in optimizer.optimizers.values()] == [optim.Muon, torch.optim.AdamW]
    assert "hidden matrices  Muon       1       0.002  3        252" in repr(optimizer)


def test_matrices_may_go_to_m3_with_options():
    optimizer = optim.param_groups(Net(), matrices=optim.M3, slow=[(5, 0.9, 0.3), (50, 0.9, 0.3)])
    group = optimizer.optimizers["hidden matrices"].param_groups[0]
    assert group["slow"] == ((5, 0.9, 0.3), (50, 0.9, 0.3)) and group["adjust_lr_fn"] == "match_rms_adamw"


def test_a_model_of_vectors_alone_and_frozen_parameters():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))
    model[1].weight.requires_grad_(False)
    assert names(optim.param_groups(model)) == {"the rest": ["0.weight", "0.bias", "1.bias"]}


def test_the_first_pattern_that_matches_decides():
    model = Net()
    optimizer = optim.param_groups(
        model,
        1e-3,
        [
            Assign("up.weight", optim.Momentum, {"lr": 0.5}, period=8, level="slow"),
            Assign("up.*", torch.optim.SGD),
            Assign("*", torch.optim.AdamW, {"weight_decay": 0.0}, period=2),
        ],
    )
    found = names(optimizer)
    assert found["slow"] == ["up.weight"] and found["up.*"] == ["up.bias"] and len(found["*"]) == 10
    rates = {g["level"]: (g["lr"], g["level_period"]) for g in optimizer.param_groups}
    assert rates == {"slow": (0.5, 8), "up.*": (1e-3, 1), "*": (1e-3, 2)}


def test_typing_mistakes_are_caught():
    with pytest.raises(ValueError, match=r"no pattern matches memory, embedding.weight, .*; end with Assign"):
        optim.param_groups(Net(), assign=[Assign("up.*", torch.optim.AdamW)])
    with pytest.raises(ValueError, match=r'pattern "upp.\*" is the first to match no parameter'):
        optim.param_groups(Net(), assign=[Assign("upp.*", torch.optim.AdamW), Assign("*", torch.optim.AdamW)])
    with pytest.raises(ValueError, match=r'level "x" is given twice'):
        optim.param_groups(Net(), assign=[Assign(p, torch.optim.AdamW, level="x") for p in ("up.*", "*")])


class TrainerLike:
    """How transformers.Trainer.create_optimizer (version 5) makes the optimizer of `optimizer_cls_and_kwargs`; the
    Trainer itself is in test_trainer.py, where it is installed."""

    def __init__(self, model, optimizer_cls_and_kwargs):
        decayed = [p for p in model.parameters() if p.dim() > 1]
        groups = [{"params": decayed, "weight_decay": 0.1}]
        groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        made, options = optimizer_cls_and_kwargs
        is_class = isinstance(made, type) and issubclass(made, torch.optim.Optimizer)
        self.optimizer = made(groups, **options) if is_class else made()(model, **options)


def test_the_way_a_trainer_makes_it():
    model = Net()
    optimizer = TrainerLike(model, (lambda: optim.param_groups, {"lr": 1e-3, "matrices": optim.M3})).optimizer
    assert isinstance(optimizer, torch.optim.Optimizer) and len(optimizer.param_groups) == 3
    optimizer = TrainerLike(model, (optim.Momentum, {"lr": 1e-3})).optimizer
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
