"""M3: Algorithm 1 written out line by line, the limits that it must have, and what the practical mode mends."""

import math

import pytest
import torch
from torch import nn

from nestling import optim
from nestling.ops import newton_schulz
from nestling.testing import assert_close

SHAPES = [(4, 6), (6, 4), (3, 3)]
NS = newton_schulz.reference.newton_schulz


def setup(steps: int = 9) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    return params, [[torch.randn_like(p) for p in params] for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, grads: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    params = optimizer.param_groups[0]["params"]
    for now in grads:
        for p, g in zip(params, now, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach().clone() for p in params]


def clone(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def algorithm_1(
    theta: torch.Tensor, g: list[torch.Tensor], eta: float, b1: float, b2: float, b3: float, alpha: float, f: int
) -> torch.Tensor:
    """As printed, gradients numbered from 1; line 3 sums (k - 1) f + 1 ... k f."""
    M1 = M2 = V = torch.zeros_like(theta)
    for k in range(len(g) // f + 1):
        M2 = M2 + b3 * sum((g[i - 1] for i in range((k - 1) * f + 1, k * f + 1) if i > 0), torch.zeros_like(theta))
        O2 = NS(M2)
        for t in range(k * f + 1, min((k + 1) * f, len(g)) + 1):
            M1 = M1 + b1 * g[t - 1]
            V = V + b2 * g[t - 1] ** 2
            theta = theta - eta * (NS(M1) + alpha * O2) / (V.sqrt() + 1e-8)
    return theta


@pytest.mark.parametrize("f", [1, 3, 4, 20])
def test_literal_is_algorithm_1(f: int) -> None:
    params, grads = setup()
    expected = [
        algorithm_1(p.detach(), [g[i] for g in grads], 0.01, 0.9, 0.5, 0.7, 0.3, f) for i, p in enumerate(params)
    ]
    made = run(optim.M3(params, 0.01, (0.9, 0.5), [(f, 0.7, 0.3)], weight_decay=0, eps=1e-8, literal=True), grads)
    for a, b in zip(made, expected, strict=True):
        assert_close(a, b)


def practical(theta, g, lr, b1, b2, slow, decay, horizon):
    """The docstring of M3, line by line."""
    m = v = torch.zeros_like(theta)
    s, read = [m] * len(slow), [m] * len(slow)
    for t, now in enumerate(g, 1):
        m, v = b1 * m + (1 - b1) * now, b2 * v + (1 - b2) * now**2
        fast = NS(b1 * m + (1 - b1) * now)
        D = fast + sum(alpha * o for o, (_, _, alpha) in zip(read, slow, strict=True))
        root = (v / (1 - b2**t)).sqrt()
        D = D / (root + 0.3 * root.square().mean().sqrt())
        theta = (1 - lr * decay) * theta
        theta = theta - lr * math.sqrt(max(1, theta.shape[0] / theta.shape[1])) * fast.norm() * D / D.norm()
        for k, (period, beta, _) in enumerate(slow):
            if t % period == 0:
                c = max(0, min(beta, 1 - 1 / (horizon * (t // period))))
                s[k] = c * s[k] + (1 - c) * sum(g[t - period : t]) / period
                read[k] = NS(s[k])
    return theta


@pytest.mark.parametrize("horizon", [None, 0.4, 1.0])
@pytest.mark.parametrize("slow", [[(3, 0.7, 0.3)], [(2, 0.5, 0.3), (4, 0.9, 0.6)], [(1, 0.9, 1.0)]])
def test_practical_mode_is_its_docstring(slow: list[tuple[int, float, float]], horizon: float | None) -> None:
    params, grads = setup(steps=13)
    options = 0.05, 0.9, 0.8, slow, 0.1, horizon or math.inf
    expected = [practical(p.detach(), [g[i] for g in grads], *options) for i, p in enumerate(params)]
    made = run(optim.M3(params, 0.05, (0.9, 0.8), slow, horizon=horizon), grads)
    for a, b in zip(made, expected, strict=True):
        assert_close(a, b)


def test_without_slow_memory_and_second_moment_it_is_muon() -> None:
    params, grads = setup()
    theirs = clone(params)
    expected = run(optim.Muon(theirs, lr=0.02), grads)
    for options in ({"slow": ()}, {"slow": [(3, 0.9, 0.0)]}):
        ours = clone(params)
        for a, b in zip(run(optim.M3(ours, 0.02, (0.95, None), **options), grads), expected, strict=True):
            assert_close(a, b)


def test_literal_with_alpha_zero_and_a_constant_divisor_is_muon_on_sums() -> None:
    """beta2 = 0 and eps = 1 make the divisor 1; the sum of gradients is a momentum that forgets nothing."""
    params, grads = setup()
    start = [p.detach().clone() for p in params]
    made = run(optim.M3(params, 0.02, (0.9, 0.0), [(3, 0.9, 0.0)], weight_decay=0, eps=1.0, literal=True), grads)
    for i, (W, a) in enumerate(zip(start, made, strict=True)):
        for t in range(1, len(grads) + 1):
            W = W - 0.02 * NS(0.9 * sum(g[i] for g in grads[:t]))
        assert_close(a, W)


def test_the_slow_memory_is_written_once_per_period_and_read_in_the_next() -> None:
    params, grads = setup(steps=14)
    optimizer = optim.M3(params, slow=[(4, 0.9, 0.5)])
    without = clone(params)
    plain = optim.M3(without, slow=())
    writes, last = 0, torch.zeros(SHAPES[0], dtype=torch.float64)
    for t, now in enumerate(grads, 1):
        run(optimizer, [now])
        run(plain, [now])
        read = optimizer.state[params[0]]["slow_0_orthogonal"]
        writes += not torch.equal(read, last)
        last = read.clone()
        assert writes == t // 4
        assert torch.equal(params[0], without[0]) == (t <= 4)


def test_the_scale_of_the_loss() -> None:
    """Literally a loss c times as large takes steps c times as small; in practice the scale does not matter."""
    params, grads = setup(steps=1)
    steps = {}
    for literal in (True, False):
        for c in (1, 100):
            moved = clone(params)
            optimizer = optim.M3(moved, 0.01, weight_decay=0, eps=1e-8 if literal else 0.3, literal=literal)
            run(optimizer, [[c * g for g in now] for now in grads])
            steps[literal, c] = (moved[0] - params[0]).detach()
    assert_close(steps[True, 100] * 100, steps[True, 1], rtol=1e-5)
    assert_close(steps[False, 100], steps[False, 1])


def test_a_parameter_that_missed_steps_keeps_its_own_clock() -> None:
    params, grads = setup(steps=6)
    late = clone(params)
    optimizer = optim.M3(late, slow=[(2, 0.9, 0.5)], horizon=0.6)
    for p, g in zip(late[1:], grads[0][1:], strict=True):
        p.grad = g
    optimizer.step()
    run(optimizer, grads[1:])
    alone = clone(params)
    run(optim.M3(alone, slow=[(2, 0.9, 0.5)], horizon=0.6), grads[1:])
    assert_close(late[0].detach(), alone[0].detach())
    assert optimizer.state[late[0]]["step"] == 5 and optimizer.state[late[1]]["step"] == 6


@pytest.mark.parametrize(
    "wrong",
    [{"betas": (1.5, 0.9)}, {"slow": [(0, 0.9, 0.5)]}, {"slow": [(5, 0.9, -1.0)]}, {"horizon": 0.0}, {"ns_steps": -1}],
)
def test_wrong_arguments_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        optim.M3(setup()[0], **wrong)
    with pytest.raises(ValueError, match="not a matrix"):
        optim.M3([nn.Parameter(torch.zeros(3))])
