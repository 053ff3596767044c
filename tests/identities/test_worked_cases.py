"""The thesis as a test: ops, written from their equations, are memory x objective x rule composed from core."""

import pytest
import torch
from torch.nn import functional as F

from nestling.core.memory import LinearMemory, MLPMemory, scan
from nestling.core.objective import DotProduct, L2Regression, ValueLess
from nestling.core.rule import chain, decay, decay_first, dgd, gradient_descent, momentum
from nestling.ops.delta_rule.reference import delta_rule
from nestling.ops.gated_delta_rule.reference import gated_delta_rule
from nestling.ops.linear_attention.reference import linear_attention
from nestling.ops.titans.reference import titans
from nestling.testing import assert_close

B, T, H, K = 2, 40, 3, 4


def tokens():
    q, k, v = torch.randn(3, B, T, H, K, dtype=torch.float64)
    beta, alpha, mu = torch.rand(3, B, T, H, dtype=torch.float64)
    return q, F.normalize(k, dim=-1), v, beta, alpha, mu


def compose(q, k, v, objective, rule, memory=None, params=None, **dials):
    """core over (B, T, H, *) tokens; dials (B, T, H)."""
    memory = LinearMemory(K, K) if memory is None else memory
    params = memory.init(B, H, dtype=torch.float64) if params is None else params
    o, params, _ = scan(
        memory,
        params,
        k.transpose(1, 2),
        v.transpose(1, 2),
        queries=q.transpose(1, 2),
        objective=objective,
        rule=rule,
        dials={name: dial.transpose(1, 2) for name, dial in dials.items()},
    )
    return o.transpose(1, 2), params


def same(actual, expected):
    (o, params), (wanted, M) = actual, expected
    assert_close(o, wanted, "output")
    assert_close(params["M"], M, "M")


def test_dot_product_with_rate_one_is_linear_attention():
    q, k, v, *_ = tokens()
    same(compose(q, k, v, DotProduct(), gradient_descent()), linear_attention(q, k, v))


def test_dot_product_with_decay_is_linear_attention_with_decay():
    q, k, v, _, alpha, _ = tokens()
    rule = chain(gradient_descent(), decay("alpha"))
    same(compose(q, k, v, DotProduct(), rule, alpha=alpha), linear_attention(q, k, v, alpha.log()))


def test_l2_regression_is_the_delta_rule():
    q, k, v, beta, *_ = tokens()
    same(compose(q, k, v, L2Regression(), gradient_descent("beta"), beta=beta), delta_rule(q, k, v, beta))


def test_decay_before_the_error_is_the_gated_delta_rule():
    q, k, v, beta, alpha, _ = tokens()
    rule = chain(decay_first("alpha"), gradient_descent("beta"))
    made = compose(q, k, v, L2Regression(), rule, alpha=alpha, beta=beta)
    same(made, gated_delta_rule(q, k, v, beta, alpha.log()))


def test_decay_beside_the_error_is_titans_and_not_the_gated_delta_rule():
    q, k, v, beta, alpha, _ = tokens()
    rule = chain(gradient_descent("beta"), decay("alpha"))
    o, params = compose(q, k, v, L2Regression(), rule, alpha=alpha, beta=beta)
    zero = torch.zeros(H, K, K, dtype=torch.float64)
    y, (_, M) = titans(q, k, v, beta, alpha.log(), weights=(zero,), chunk_size=1)
    same((o, params), (y, M))
    gated, _ = gated_delta_rule(q, k, v, beta, alpha.log())
    assert (gated - o).norm() > 0.1 * o.norm()


def test_dgd_on_the_dot_product_is_the_delta_rule():
    """DGD erases what plain gradient descent on <Mk, v> leaves; its exact rate is eta / (1 + eta |k|^2)."""
    q, k, v, beta, *_ = tokens()
    made = compose(q, k, v, DotProduct(), dgd("beta"), beta=beta)
    same(made, delta_rule(q, k, v, beta / (1 + beta)))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_surprise_with_momentum_and_forgetting_is_titans(kind):
    q, k, v, eta, alpha, mu = tokens()
    eta = 0.1 * eta
    memory = LinearMemory(K, K) if kind == "linear" else MLPMemory(K, 6)
    params = memory.init(B, H, dtype=torch.float64)
    weights = tuple(w[0] for w in params.values())
    rule = chain(gradient_descent("eta"), momentum("mu"), decay("alpha"))
    o, params = compose(q, k, v, L2Regression(), rule, memory, params, eta=eta, mu=mu, alpha=alpha)
    y, state = titans(q, k, v, eta, alpha.log(), mu.log(), weights=weights, chunk_size=1)
    assert_close(o, y, "output")
    for made, start, deviation in zip(params.values(), weights, state[len(weights) :], strict=False):
        assert_close(made, start + deviation, "memory")


def test_a_window_written_at_once_is_a_titans_chunk():
    """The defining chunk form: gradients of 8 tokens at the window's first state, summed."""
    q, k, v, eta, *_ = tokens()
    memory = MLPMemory(K, 6)
    params = memory.init(B, H, dtype=torch.float64)
    weights = tuple(w[0] for w in params.values())
    pairs = (x.transpose(1, 2) for x in (k, v))
    _, params, _ = scan(
        memory, params, *pairs, objective=L2Regression(), rule=gradient_descent(0.05), period=8, read="before"
    )
    _, state = titans(q, k, v, torch.full_like(eta, 0.05), weights=weights, chunk_size=8)
    for made, start, deviation in zip(params.values(), weights, state[2:], strict=True):
        assert_close(made, start + deviation, "memory")


def test_a_decayed_value_less_linear_memory_of_gradients_is_sgd_with_momentum():
    """(33), (34): keys are gradients, there are no values; W <- W + m."""
    ours, theirs = [torch.nn.Parameter(torch.ones(6, dtype=torch.float64)) for _ in range(2)]
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    memory, rule = LinearMemory(6, 1), chain(gradient_descent(0.1), decay(0.9))
    m, state = memory.init(dtype=torch.float64), [None, None]
    for _ in range(20):
        for w in (ours, theirs):
            w.grad = None
            (w.square() * torch.arange(6)).sum().sqrt().backward()
        m, state = memory.write(m, state, ours.grad[None], None, objective=ValueLess(), rule=rule)
        with torch.no_grad():
            ours += m["M"][:, 0]
        sgd.step()
        assert_close(ours.data, theirs.data, "weights")


def test_momentum_on_the_weights_is_sgd_with_momentum():
    """The same optimizer as a rule of the weights: momentum, then the rate."""
    weight = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    memory, rule = LinearMemory(3, 2), chain(momentum(0.9), gradient_descent(0.1))
    params = {"M": weight.detach().clone()}
    state = rule.init(params)
    for _ in range(10):
        k, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
        weight.grad = None
        (0.5 * (k @ weight - v).square().sum()).backward()
        sgd.step()
        params, state = memory.write(params, state, k, v, objective=L2Regression(), rule=rule)
        assert_close(params["M"], weight.data, "weights")
