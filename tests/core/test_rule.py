import pytest
import torch

from nestling.core.rule import (
    Write,
    apply,
    chain,
    decay,
    decay_first,
    delta_momentum,
    dgd,
    gradient_descent,
    momentum,
)
from nestling.testing import assert_close


def case(n=1):
    W, G = torch.randn(2, 5, 3, dtype=torch.float64)
    X = torch.randn(n, 5, dtype=torch.float64)
    return {"W": W}, {"W": G}, {"W": X}


def step(rule, params, gradient, inputs, state=None, **dials):
    write = Write(params, inputs, {name: torch.as_tensor(x, dtype=torch.float64) for name, x in dials.items()})
    updates, state = rule.update(gradient, rule.init(params) if state is None else state, write)
    return apply(params, updates), state


def test_decay_keeps_a_fraction_of_the_old_memory():
    params, gradient, inputs = case()
    new, _ = step(chain(gradient_descent(0.1), decay(0.9)), params, gradient, inputs)
    assert_close(new["W"], 0.9 * params["W"] - 0.1 * gradient["W"], "W")


def test_decay_first_prepares_and_leaves_updates_alone():
    params, gradient, inputs = case()
    rule = chain(decay_first("alpha"), gradient_descent(0.1))
    prepared = rule.prepare(Write(params, inputs, {"alpha": torch.tensor(0.5, dtype=torch.float64)}))
    assert_close(prepared["W"], 0.5 * params["W"], "prepared")
    new, _ = step(rule, prepared, gradient, inputs)
    assert_close(new["W"], prepared["W"] - 0.1 * gradient["W"], "W")


def test_momentum_before_or_after_the_rate_differs_only_when_the_rate_changes():
    params, gradient, inputs = case()
    for eta, equal in ((0.1, True), (0.3, False)):
        ends = []
        for rule in (chain(momentum(0.9), gradient_descent("eta")), chain(gradient_descent("eta"), momentum(0.9))):
            new, state = step(rule, params, gradient, inputs, eta=0.1)
            ends.append(step(rule, new, gradient, inputs, state, eta=eta)[0]["W"])
        assert torch.allclose(*ends) is equal


def test_a_dial_may_be_a_tensor_over_memories():
    W = torch.randn(2, 5, 3, dtype=torch.float64)
    new, _ = step(gradient_descent("eta"), {"W": W}, {"W": W}, {}, eta=[0.0, 1.0])
    assert_close(new["W"], torch.stack([W[0], torch.zeros_like(W[1])]), "W")


def test_a_missing_dial_is_named():
    params, gradient, inputs = case()
    with pytest.raises(ValueError, match="dial 'eta' is missing"):
        step(gradient_descent("eta"), params, gradient, inputs)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_dgd_solves_in_pairs_what_it_states_in_inputs(n):
    params, gradient, inputs = case(n)
    X, W, G = inputs["W"], params["W"], gradient["W"]
    new, _ = step(dgd(0.7, erase=0.4), params, gradient, inputs)
    left = torch.eye(5, dtype=torch.float64) / 0.7 + 0.4 * X.mT @ X
    assert_close(new["W"], torch.linalg.solve(left, W / 0.7 - G), "W")


@pytest.mark.parametrize("side", ["right", "left", "scalar"])
def test_delta_momentum_erases_on_the_stated_side(side):
    """Written in the paper's orientation (out x in), our parameters transposed."""
    params, gradient, _ = case()
    G, m = gradient["W"].mT, torch.randn(3, 5, dtype=torch.float64)
    g = G / G.norm()
    erased = {"right": m @ g.mT @ g, "left": g @ g.mT @ m, "scalar": g.square().sum() * m}[side]
    rule = delta_momentum(0.9, 0.1, 0.5, side=side)
    updates, _ = rule.update(gradient, {"W": m.mT}, Write(params, {}, {}))
    assert_close(updates["W"].mT, 0.9 * m - 0.5 * erased - 0.1 * G, "m")


def test_delta_momentum_survives_a_zero_gradient():
    params, gradient, _ = case()
    zero = {"W": torch.zeros_like(gradient["W"])}
    updates, _ = delta_momentum(0.9, 0.1, 0.5).update(zero, {"W": params["W"]}, Write(params, {}, {}))
    assert_close(updates["W"], 0.9 * params["W"], "m")


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match="side is 'up'"):
        delta_momentum(0.9, 0.1, 0.5, side="up")
