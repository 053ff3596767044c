"""Paper sections 1 and 2.6: proximal steps, surprise, DGD. Numbers in brackets are equations of arXiv 2512.24695."""

import pytest
import torch

from nestling.core.memory import LinearMemory, scan
from nestling.core.objective import DotProduct, L2Regression
from nestling.core.rule import Write, apply, chain, decay, delta_momentum, dgd, gradient_descent, momentum
from nestling.testing import assert_close

KEYS, VALUES = 6, 4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def minimise(objective, start):
    """Numerical argmin of a smooth convex function of one matrix."""
    W = start.clone().requires_grad_()
    tolerance = {"tolerance_grad": 1e-13, "tolerance_change": 0}
    solver = torch.optim.LBFGS([W], max_iter=500, line_search_fn="strong_wolfe", **tolerance)

    def closure():
        solver.zero_grad()
        loss = objective(W)
        loss.backward()
        return loss

    solver.step(closure)
    return W.detach()


def one_step(rule, W, gradient, inputs):
    params = {"W": W}
    updates, _ = rule.update({"W": gradient}, rule.init(params), Write(params, {"W": inputs}, {}))
    return apply(params, updates)["W"]


def test_gradient_descent_is_the_proximal_step():
    """(1), (9): argmin <g, W> + |W - W_t|^2 / (2 eta)."""
    W, g = randn(2, KEYS, VALUES)
    expected = minimise(lambda X: (g * X).sum() + (X - W).square().sum() / 0.6, W)
    assert_close(one_step(gradient_descent(0.3), W, g, randn(1, KEYS)), expected, "W", rtol=1e-7)


def test_a_constant_rate_accumulates_gradients():
    """(3): the trajectory ends at W_1 - eta sum of the gradients met on the way."""
    memory, eta = LinearMemory(KEYS, VALUES), 0.2
    k, v = randn(5, KEYS), randn(5, VALUES)
    params = {"M": randn(KEYS, VALUES)}
    start, met = params["M"], []
    for t in range(5):
        pair = k[t : t + 1], v[t : t + 1]
        met.append(memory.gradient(params, *pair, L2Regression())["M"])
        params, _ = memory.write(params, None, *pair, objective=L2Regression(), rule=gradient_descent(eta))
    assert_close(params["M"], start - eta * torch.stack(met).sum(0), "M")


def test_the_gradient_of_a_linear_layer_is_surprise_times_input():
    """(7)-(9): for any loss through y = W x."""
    W, x = randn(KEYS, VALUES).requires_grad_(), randn(1, KEYS)
    y = LinearMemory(KEYS, VALUES).read({"M": W}, x)
    (surprise,) = torch.autograd.grad(y.sin().cumsum(-1).square().sum(), y, retain_graph=True)
    (expected,) = torch.autograd.grad(y.sin().cumsum(-1).square().sum(), W)
    assert_close(LinearMemory(KEYS, VALUES).pullback({"M": W}, x, surprise)["M"], expected, "dL/dW")


def test_one_dot_product_step_is_linear_attention():
    """(14)-(18), and over a sequence the parallel form tril(Q K^T) V."""
    q, k, v = randn(9, KEYS), randn(9, KEYS), randn(9, VALUES)
    memory = LinearMemory(KEYS, VALUES)
    out, params, _ = scan(
        memory, memory.init(dtype=torch.float64), k, v, queries=q, objective=DotProduct(), rule=gradient_descent()
    )
    assert_close(params["M"], k.mT @ v, "M")
    assert_close(out, (q @ k.mT).tril() @ v, "o")


@pytest.mark.parametrize("norm", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("pairs", [1, 3])
def test_dgd_is_the_argmin_it_states(norm, pairs):
    """(56) with u = -dL/dy, solved numerically, for any input norm and as a batch."""
    W, eta = randn(KEYS, VALUES), 0.7
    x = torch.nn.functional.normalize(randn(pairs, KEYS), dim=-1) * norm
    surprise = randn(pairs, VALUES)
    expected = minimise(lambda X: 0.5 * (x @ X + surprise).square().sum() + (X - W).square().sum() / (2 * eta), W)
    assert_close(one_step(dgd(eta), W, x.mT @ surprise, x), expected, "W", rtol=1e-6)


@pytest.mark.parametrize("norm", [1.0, 2.5])
def test_dgd_closed_form_for_one_input(norm):
    """(57) with eta' = eta / (1 + eta |x|^2): the printed eta / (1 + eta) is the case |x| = 1."""
    W, eta = randn(KEYS, VALUES), 0.7
    x = torch.nn.functional.normalize(randn(1, KEYS), dim=-1) * norm
    g = x.mT @ randn(1, VALUES)
    rate = eta / (1 + eta * norm**2)
    assert_close(one_step(dgd(eta), W, g, x), W - rate * x.mT @ (x @ W) - rate * g, "W")


def test_dgd_without_erase_is_gradient_descent():
    W, g = randn(2, KEYS, VALUES)
    x = randn(3, KEYS)
    assert_close(one_step(dgd(0.3, erase=0.0), W, g, x), one_step(gradient_descent(0.3), W, g, x), "W")


def test_dgd_leaves_orthogonal_directions_untouched():
    W, x, z = randn(KEYS, VALUES), randn(1, KEYS), randn(1, KEYS)
    z = z - (z @ x.mT) / (x @ x.mT) * x
    new = one_step(dgd(0.7), W, x.mT @ randn(1, VALUES), x)
    assert_close(z @ new, z @ W, "W z")


def test_dgd_from_zero_with_orthonormal_inputs_is_gradient_descent_at_its_rate():
    x = torch.linalg.qr(randn(KEYS, 3))[0].mT
    g = x.mT @ randn(3, VALUES)
    zero = torch.zeros(KEYS, VALUES, dtype=torch.float64)
    assert_close(one_step(dgd(0.7), zero, g, x), one_step(gradient_descent(0.7 / 1.7), zero, g, x), "W")


@pytest.mark.parametrize("orthonormal", [True, False])
def test_batch_dgd_is_sequential_dgd_exactly_for_orthonormal_inputs(orthonormal):
    x = torch.linalg.qr(randn(KEYS, 3))[0].mT if orthonormal else randn(3, KEYS)
    W, surprise = randn(KEYS, VALUES), randn(3, VALUES)
    batch = one_step(dgd(0.7), W, x.mT @ surprise, x)
    one_by_one = W
    for i in range(3):
        one_by_one = one_step(dgd(0.7), one_by_one, x[i : i + 1].mT @ surprise[i : i + 1], x[i : i + 1])
    assert torch.allclose(batch, one_by_one, rtol=1e-10, atol=1e-12) is orthonormal


def test_momentum_is_a_memory_with_its_own_proximal_step():
    """(10)-(13): m <- m + eta g = argmin -<m, g> + |m - m_t|^2 / (2 eta)."""
    m, g = randn(2, KEYS, VALUES)
    updates, state = momentum(1.0).update({"W": 0.3 * g}, {"W": m}, Write({"W": m}, {}, {}))
    expected = minimise(lambda X: -(X * g).sum() + (X - m).square().sum() / 0.6, m)
    assert_close(state["W"], expected, "m", rtol=1e-7)


def test_delta_momentum_is_the_gradient_step_of_its_regression():
    """(48), (49): GD on 1/2 |m G^T + I|^2, in the paper's orientation; the printed erase lacks the rate."""
    m, G = randn(KEYS, VALUES).requires_grad_(), randn(KEYS, VALUES)
    loss = 0.5 * (m @ G.mT + torch.eye(KEYS, dtype=torch.float64)).square().sum()
    (gradient,) = torch.autograd.grad(loss, m)
    rule = delta_momentum(1.0, 0.1, 0.1, normalize=False)
    updates, _ = rule.update({"W": G.mT}, {"W": m.detach().mT}, Write({}, {}, {}))
    assert_close(updates["W"].mT, (m - 0.1 * gradient).detach(), "m")


def test_delta_momentum_without_erase_is_momentum():
    W, G = randn(2, KEYS, VALUES)
    params, m = {"W": W}, {"W": randn(KEYS, VALUES)}
    delta, _ = delta_momentum(0.9, 0.1, 0.0).update({"W": G}, m, Write(params, {}, {}))
    plain, _ = chain(gradient_descent(0.1), momentum(0.9)).update({"W": G}, [None, m], Write(params, {}, {}))
    assert_close(delta["W"], plain["W"], "m")


def test_decayed_value_less_memory_forgets_geometrically():
    """(45): the weight of the i-th last gradient is alpha^i."""
    rule = chain(gradient_descent(1.0), decay(0.9))
    params = {"M": torch.zeros(1, 1, dtype=torch.float64)}
    for g in (1.0, 0.0, 0.0):
        updates, _ = rule.update({"M": torch.full((1, 1), g, dtype=torch.float64)}, [None, None], Write(params, {}, {}))
        params = apply(params, updates)
    assert_close(params["M"], torch.full((1, 1), -0.81, dtype=torch.float64), "m")
