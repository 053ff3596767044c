"""Muon against torch.optim.Muon, and against the definition written out in twenty lines."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling import optim
from nestling.testing import assert_close

SHAPES = [(8, 8), (6, 12), (12, 6), (8, 8), (3, 20)]


def by_definition(W, grads, lr, weight_decay=0.1, momentum=0.95, nesterov=True, steps=5):
    m = torch.zeros_like(W)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        X = (1 - momentum) * g + momentum * m if nesterov else m
        X = X.T if X.shape[0] > X.shape[1] else X
        X = X / X.norm()
        for _ in range(steps):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        X = X if X.shape == W.shape else X.T
        W = (1 - lr * weight_decay) * W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * X
    return W


def matrices(dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def run(optimizer, params, grads):
    for now in grads:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_definition_in_float64(nesterov):
    params = matrices()
    start = [p.detach().clone() for p in params]
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    run(optim.Muon(params, lr=0.03, nesterov=nesterov), params, grads)
    for i, (p, W) in enumerate(zip(params, start, strict=True)):
        assert_close(p.detach(), by_definition(W, [g[i] for g in grads], 0.03, nesterov=nesterov))


def test_arguments_and_defaults_are_those_of_torch():
    ours = list(inspect.signature(optim.Muon).parameters.values())
    theirs = list(inspect.signature(torch.optim.Muon).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("ns_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_one_step_of_torch_within_five_percent_of_the_rate(adjust, ns_dtype):
    ours, theirs = matrices(torch.float32), []
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    grads = [[torch.randn_like(p) for p in ours]]
    run(optim.Muon(ours, lr=0.1, adjust_lr_fn=adjust, ns_dtype=ns_dtype), ours, grads)
    run(torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn=adjust), theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        scale = 0.2 * math.sqrt(max(p.shape)) if adjust == "match_rms_adamw" else math.sqrt(max(1, len(p) / len(p.T)))
        assert (p - q).abs().max() < 0.05 * 0.1 * scale


def test_the_loss_after_fifty_steps_is_that_of_torch_within_one_percent():
    x = torch.randn(64, 12)
    y = torch.tanh(x @ torch.randn(12, 4))
    losses = []
    for make in (optim.Muon, torch.optim.Muon):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 24, bias=False), nn.Tanh(), nn.Linear(24, 4, bias=False))
        optimizer = make(model.parameters(), lr=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(F.mse_loss(model(x), y).item())
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_state_of_torch_can_be_loaded():
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    grads = [[torch.randn_like(p) for p in ours]]
    saved = torch.optim.Muon(theirs, lr=0.1)
    run(saved, theirs, grads)
    optimizer = optim.Muon(ours)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.1
    run(optimizer, ours, grads)
    run(saved, theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(optimizer.state[p]["momentum_buffer"], saved.state[q]["momentum_buffer"], rtol=1e-6)


def test_convolution_kernels_are_matrices_and_vectors_are_refused():
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    flat = nn.Parameter(kernel.detach().reshape(4, 12).clone())
    g = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    run(optim.Muon([kernel]), [kernel], [[g]])
    run(optim.Muon([flat]), [flat], [[g.reshape(4, 12)]])
    assert_close(kernel.detach().reshape(4, 12), flat.detach())
    with pytest.raises(ValueError, match=r"shape \(3,\) is not a matrix.*param_groups"):
        optim.Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(
    "wrong", [{"ns_steps": 100}, {"adjust_lr_fn": "other"}, {"momentum": -1}, {"weight_decay": -1}]
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        optim.Muon(matrices(), **wrong)
