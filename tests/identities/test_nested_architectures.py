"""Paper section 3 and Titans: architectures as solved or descended inner objectives."""

import pytest
import torch
from torch.nn import functional as F

from nestling.core.memory import LinearMemory, scan
from nestling.core.objective import L2Regression
from nestling.core.rule import gradient_descent
from nestling.ops.delta_rule.chunk import delta_rule
from nestling.ops.gated_delta_rule.chunk import gated_delta_rule
from nestling.ops.linear_attention.chunk import linear_attention
from nestling.ops.titans.chunk import titans
from nestling.testing import assert_close

KEYS, VALUES = 5, 3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape):
    return F.normalize(randn(*shape), dim=-1)


def test_softmax_attention_is_the_argmin_of_a_weighted_regression():
    """(62): Nadaraya-Watson; the closed form is softmax attention, and a numerical solver finds it."""
    q, k, v = randn(KEYS), randn(9, KEYS), randn(9, VALUES)
    similarity = (k @ q / KEYS**0.5).exp()
    y = torch.zeros(VALUES, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [y], max_iter=200, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = (similarity * (v - y).square().sum(-1)).sum()
        loss.backward()
        return loss

    solver.step(closure)
    attention = F.scaled_dot_product_attention(q[None, None], k[None], v[None])[0, 0]
    assert_close((similarity @ v / similarity.sum()), attention, "closed form")
    assert_close(y.detach(), attention, "solver", rtol=1e-7)


def test_windowed_attention_is_the_same_regression_on_the_window():
    """(63)."""
    q, k, v = randn(9, KEYS), randn(9, KEYS), randn(9, VALUES)
    place = torch.arange(9)
    window = (place[:, None] >= place) & (place[:, None] < place + 4)
    attention = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=window)[0]
    similarity = (q @ k.mT / KEYS**0.5).exp() * window
    assert_close(similarity @ v / similarity.sum(-1, keepdim=True), attention, "attention")


def write_twice_and_read(op, *gates):
    """Two values under one key, read at that key: o (2 tokens, V)."""
    k, v = unit(1, 1, 1, KEYS).expand(1, 2, 1, KEYS), randn(1, 2, 1, VALUES)
    o, _ = op(k, k, v, *gates)
    return o[0, :, 0], v[0, :, 0]


def test_the_delta_rule_returns_what_was_written_and_overwrites():
    o, v = write_twice_and_read(delta_rule, torch.ones(1, 2, 1, dtype=torch.float64))
    assert_close(o, v, "reads")


def test_the_hebbian_rule_returns_the_sum():
    o, v = write_twice_and_read(linear_attention)
    assert_close(o, v.cumsum(0), "reads")


def test_linear_attention_is_tril_qk_v():
    q, k, v = randn(1, 50, 1, KEYS), randn(1, 50, 1, KEYS), randn(1, 50, 1, VALUES)
    o, _ = linear_attention(q, k, v, chunk_size=16)
    assert_close(o[0, :, 0], (q[0, :, 0] @ k[0, :, 0].mT).tril() @ v[0, :, 0], "output")


def test_gated_delta_without_decay_is_the_delta_rule():
    q, k, v, beta = randn(2, 70, 1, KEYS), unit(2, 70, 1, KEYS), randn(2, 70, 1, VALUES), torch.rand(2, 70, 1).double()
    for a, b in zip(gated_delta_rule(q, k, v, beta, torch.zeros_like(beta)), delta_rule(q, k, v, beta), strict=True):
        assert_close(a, b, "gated")


def test_oja_is_the_delta_rule_with_keys_and_values_exchanged():
    """(66), (67): M <- M + eta (v k^T - v v^T M) is -1/2 of the gradient of -2 <M k, v> + |M^T v|^2."""
    k, v, eta = randn(6, KEYS), 0.5 * randn(6, VALUES), 0.3
    M = torch.zeros(VALUES, KEYS, dtype=torch.float64)
    for key, value in zip(k, v, strict=True):
        M = M.requires_grad_()
        (gradient,) = torch.autograd.grad(-2 * (M @ key) @ value + (M.mT @ value).square().sum(), M)
        M = (M - eta * 0.5 * gradient).detach()
    x, y = v[None, :, None], k[None, :, None]  # what is the key for the op, what is the value
    _, state = delta_rule(x, x, y, torch.full((1, 6, 1), eta, dtype=torch.float64))
    assert_close(state[0, 0], M, "M")


@pytest.mark.parametrize("window", [1, 3])
def test_omega_rule_descends_a_window_and_is_the_online_rule_for_one_input(window):
    """(68), with the gradient sign and nabla it needs; gamma = 1."""
    memory, k, v = LinearMemory(KEYS, VALUES), unit(8, KEYS), randn(8, VALUES)
    rule = {"objective": L2Regression(), "rule": gradient_descent(0.3)}
    params = memory.init(dtype=torch.float64)
    M = params["M"]
    for t in range(8):
        seen = slice(max(0, t - window + 1), t + 1)
        params, _ = memory.write(params, None, k[seen], v[seen], **rule)
        W = M.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(0.5 * (k[seen] @ W - v[seen]).square().sum(), W)
        M = M - 0.3 * gradient
    assert_close(params["M"], M, "M")
    _, online, _ = scan(memory, memory.init(dtype=torch.float64), k, v, **rule)
    assert torch.allclose(online["M"], params["M"], rtol=1e-10, atol=1e-12) is (window == 1)


def titans_case():
    q, k, v = unit(2, 30, 2, KEYS), unit(2, 30, 2, KEYS), randn(2, 30, 2, KEYS)
    return q, k, v, torch.rand(2, 30, 2, dtype=torch.float64), (torch.zeros(2, KEYS, KEYS, dtype=torch.float64),)


def test_titans_without_momentum_and_forgetting_is_the_delta_rule():
    q, k, v, eta, weights = titans_case()
    y, (_, M) = titans(q, k, v, eta, weights=weights, chunk_size=1)
    o, state = delta_rule(q, k, v, eta)
    assert_close(y, o, "output")
    assert_close(M, state, "state")


def test_titans_with_vanishing_momentum_is_titans_without():
    q, k, v, eta, weights = titans_case()
    tiny = torch.full_like(eta, -200.0)
    with_momentum, _ = titans(q, k, v, eta, tiny / 1000, tiny, weights=weights, chunk_size=4)
    without, _ = titans(q, k, v, eta, tiny / 1000, weights=weights, chunk_size=4)
    assert_close(with_momentum, without, "output")


def test_titans_with_forgetting_takes_the_error_on_the_undecayed_memory():
    """M_t = alpha M - eta k (M^T k - v)^T: not the gated delta rule, whose erase is alpha eta."""
    q, k, v, eta, weights = titans_case()
    decay = torch.full_like(eta, -0.5)
    _, (_, M) = titans(q, k, v, eta, decay, weights=weights, chunk_size=1)
    expected = torch.zeros_like(M)
    for t in range(30):
        key, rate = k[:, t, :, :, None], eta[:, t, :, None, None]
        error = (expected * key).sum(-2, keepdim=True) - v[:, t, :, None]
        expected = decay[:, t, :, None, None].exp() * expected - rate * key * error
    assert_close(M, expected, "M")
    _, gated = gated_delta_rule(q, k, v, eta, decay)
    assert (gated - M).norm() > 0.01 * M.norm()


def test_a_longer_titans_chunk_is_not_the_token_loop():
    """Chunk size defines the memory: gradients are taken at the chunk's first state. Only size 1 is the loop."""
    q, k, v, eta, weights = titans_case()
    one, _ = titans(q, k, v, 0.1 * eta, weights=weights, chunk_size=1)
    four, _ = titans(q, k, v, 0.1 * eta, weights=weights, chunk_size=4)
    assert (one - four).norm() > 1e-3 * one.norm()
