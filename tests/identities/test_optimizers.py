"""Paper section 2: optimizers are memories of gradients. Numbers in brackets are equations of arXiv 2512.24695."""

import copy

import pytest
import torch
from torch import nn

from nestling.core.rule import delta_momentum
from nestling.optim import (
    DGD,
    DeltaMomentum,
    Diagonal,
    Given,
    Kronecker,
    Momentum,
    PreconditionedMomentum,
    RuleOptimizer,
)
from nestling.testing import assert_close

SHAPES = ((), (5,), (4, 3), (2, 3, 4), (2, 3, 2, 2))


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameters():
    torch.manual_seed(1)
    made = [randn(*shape) for shape in SHAPES] + [randn(3, 6).mT]  # the last one is not contiguous
    return [p.requires_grad_() for p in made]


def run(make, steps=50):
    """Parameters after some steps on a quartic with noise that depends on the step only."""
    params = parameters()
    optimizer = make(params)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for p in params:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            ((p - 1).pow(4).sum() / 40 + (noise * p).sum() / 10).backward()
        optimizer.step()
    return params


def same(make, expected, steps=50, rtol=1e-10):
    for ours, theirs in zip(run(make, steps), run(expected, steps), strict=True):
        assert_close(ours, theirs, "W", rtol)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0}, {"nesterov": True}, {"weight_decay": 0.1, "nesterov": True}], ids=str
)
def test_momentum_is_torch_sgd(options, foreach):
    """(33): a value-less linear memory with decay."""
    theirs = {"momentum": 0.9, **options}
    same(
        lambda p: Momentum(p, 0.05, **options, foreach=foreach),
        lambda p: torch.optim.SGD(p, 0.05, **theirs, foreach=foreach),
    )


def test_the_identity_as_preconditioner_is_momentum():
    """(46), (47) with P = I."""
    same(lambda p: PreconditionedMomentum(p, 0.05, 0.8, Given(lambda g: g)), lambda p: Momentum(p, 0.05, 0.8))


def test_a_given_preconditioner_is_the_value_that_is_stored():
    """(46), (47): m <- alpha m + P G."""
    P, m = randn(4, 4), torch.zeros(4, 3, dtype=torch.float64)
    W = randn(4, 3).requires_grad_()
    optimizer, expected = PreconditionedMomentum([W], 0.1, 0.8, Given(lambda g: P @ g)), W.detach().clone()
    for _ in range(3):
        W.grad = randn(4, 3)
        m = 0.8 * m + P @ W.grad
        expected = expected - 0.1 * m
        optimizer.step()
    assert_close(W.detach(), expected, "W")


def test_the_diagonal_preconditioner_without_momentum_is_adam_without_first_moment():
    """(100)-(105), with means and bias correction."""
    same(
        lambda p: PreconditionedMomentum(p, 0.01, 0.0, Diagonal(beta=0.9)),
        lambda p: torch.optim.Adam(p, 0.01, betas=(0.0, 0.9)),
    )


def test_kronecker_factors_of_one_gradient_orthogonalise_it():
    """(106)-(111) on both sides: (G G^T)^(-1/4) G (G^T G)^(-1/4) is the polar factor."""
    W, G = randn(5, 5).requires_grad_(), randn(5, 5)
    W.grad = G
    start = W.detach().clone()
    PreconditionedMomentum([W], 1.0, 0.0, Kronecker(beta=0.0, eps=0.0)).step()
    U, _, Vh = torch.linalg.svd(G)
    assert_close(start - W.detach(), U @ Vh, "step", rtol=1e-7)


def test_one_kronecker_factor_takes_the_whole_exponent():
    """(111): H^(-1/2) G, the other side too long for a factor."""
    W, G = randn(3, 5).requires_grad_(), randn(3, 5)
    W.grad = G
    start = W.detach().clone()
    PreconditionedMomentum([W], 1.0, 0.0, Kronecker(beta=0.0, eps=0.0, largest=4)).step()
    step = start - W.detach()
    assert_close(step @ step.mT, torch.eye(3, dtype=torch.float64), "step step^T", rtol=1e-7)


def test_the_adam_objective_is_solved_by_the_ratio_of_sums():
    """(101), (102): argmin sum (m g_i - P)^2 + lambda m^2; with P = sqrt(sum g^2) it is the step of (105)."""
    g, lam = randn(7, 5), 0.3
    P = g.square().sum(0).sqrt()
    m = g.sum(0) * P / (g.square().sum(0) + lam)
    assert_close(((m * g - P) * g).sum(0) + lam * m, torch.zeros_like(m), "gradient")
    assert_close(g.sum(0) * P / g.square().sum(0), g.sum(0) / P, "m at lambda = 0")


@pytest.mark.parametrize("erase", ["right", "left", "scalar"])
def test_erase_rate_zero_is_momentum(erase):
    same(lambda p: DeltaMomentum(p, 0.05, 0.8, erase, erase_rate=0.0), lambda p: Momentum(p, 0.05, 0.8))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("erase", ["right", "left", "scalar"])
def test_delta_momentum_is_the_rule_of_core(erase, normalize, foreach):
    """(48), (49) in the paper's units, lr inside m: the same weights for a constant lr."""
    rule, rate = (
        delta_momentum("momentum", "lr", "erase_rate", side=erase, normalize=normalize),
        0.3 if normalize else 0.01,
    )
    same(
        lambda p: DeltaMomentum(p, 0.05, 0.8, erase, erase_rate=rate, normalize=normalize, foreach=foreach),
        lambda p: RuleOptimizer(p, rule, lr=0.05, momentum=0.8, erase_rate=rate),
    )


def test_delta_momentum_descends_its_regression():
    """(48): a step of rate 1 on 1/2 |m G^T + P|^2 with P = I, beside the decay."""
    W = randn(4, 3).requires_grad_()
    optimizer = DeltaMomentum([W], 0.1, 0.9, erase_rate=0.2, normalize=False)
    W.grad = randn(4, 3)
    optimizer.step()
    m, G = optimizer.state[W]["momentum_buffer"].clone().requires_grad_(), randn(4, 3)
    eye = torch.eye(4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(0.5 * (0.2**0.5 * m @ G.mT - 0.2**-0.5 * eye).square().sum(), m)
    expected = (0.9 * m - gradient).detach()  # P = -I: the memory holds what lr takes away
    W.grad = G
    optimizer.step()
    assert_close(optimizer.state[W]["momentum_buffer"], expected, "m")


def test_delta_momentum_is_preconditioned_momentum_where_nothing_is_erased():
    """(49) with G^T G = 0: no erase on inputs that the memory has not seen."""
    same(
        lambda p: DeltaMomentum(p, 0.01, 0.9, erase_rate=0.0, preconditioner=Diagonal(beta=0.9)),
        lambda p: PreconditionedMomentum(p, 0.01, 0.9, Diagonal(beta=0.9)),
    )


def test_the_normalised_erase_keeps_the_memory_bounded():
    """|alpha - eta sigma^2| < 1 for any gradient: m stays below |G| / (1 - alpha), however large G is."""
    W = randn(4, 3).requires_grad_()
    optimizer = DeltaMomentum([W], 0.0, 0.9, erase_rate=1.8)
    G = 1e3 * randn(4, 3)
    for _ in range(200):
        W.grad = G
        optimizer.step()
    assert optimizer.state[W]["momentum_buffer"].norm() <= G.norm() / (1 - 0.9) * (1 + 1e-12)


def test_the_printed_form_without_a_bound_diverges():
    W = randn(4, 3).requires_grad_()
    optimizer = DeltaMomentum([W], 0.0, 0.9, erase_rate=1.0, normalize=False)
    W.grad = 3 * randn(4, 3)
    for _ in range(50):
        optimizer.step()
    assert optimizer.state[W]["momentum_buffer"].norm() > 1e6


def test_what_decayed_momentum_remembers():
    """(45): of the gradients, weighted 1 - beta, the last 7 make up 0.52 and the last 44 make up 0.99."""
    W = torch.zeros(300, dtype=torch.float64, requires_grad=True)
    optimizer = Momentum([W], 0.1, 0.9)
    for gradient in torch.eye(300, dtype=torch.float64):
        W.grad = 0.1 * gradient
        optimizer.step()
    kept = optimizer.state[W]["momentum_buffer"].flip(0).cumsum(0)
    assert kept[6].item() == pytest.approx(0.5217, abs=1e-4) and kept[43].item() == pytest.approx(0.9903, abs=1e-4)


def dgd_step(x, weight, lr=0.7, loss=lambda y: y.sin().sum(), **options):
    """The weight (out, in) after one step of DGD on inputs x (N, in), and its gradient -u_n at each output."""
    layer = nn.Linear(x.shape[1], len(weight), bias=False, dtype=torch.float64)
    layer.weight.data = weight.clone()
    optimizer = DGD(layer, lr, **options)
    y = layer(x)
    y.retain_grad()
    loss(y).backward()
    optimizer.step()
    return layer.weight.detach(), y.grad


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


@pytest.mark.parametrize("norm", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dgd_is_the_argmin_it_states(n, norm, reduction):
    """(56), solved numerically for any input norm; the mean of a batch counts each sample 1/B."""
    W, x = randn(4, 6), nn.functional.normalize(randn(n, 6), dim=-1) * norm
    share = 1 / n if reduction == "mean" else 1.0
    new, minus_u = dgd_step(x, W, loss=lambda y: share * y.sin().sum(), reduction=reduction)
    u = -minus_u / share
    expected = minimise(lambda X: share * 0.5 * (x @ X.mT - u).square().sum() + (X - W).square().sum() / (2 * 0.7), W)
    assert_close(new, expected, "W", rtol=1e-6)


@pytest.mark.parametrize("norm", [1.0, 2.5])
@pytest.mark.parametrize("exact", [True, False])
def test_one_column_is_the_printed_closed_form(norm, exact):
    """(57): W (I - eta' x x^T) + eta' u x^T with eta' = eta / (1 + eta |x|^2); printed for |x| = 1."""
    W, x, eta = randn(4, 6), nn.functional.normalize(randn(1, 6), dim=-1) * norm, 0.7
    new, minus_u = dgd_step(x, W, eta, exact=exact)
    rate = eta / (1 + eta * norm**2)
    assert_close(new, W - rate * W @ x.mT @ x - rate * minus_u.mT @ x, "W")


@pytest.mark.parametrize("exact", [True, False])
def test_erase_zero_is_sgd(exact):
    torch.manual_seed(3)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    theirs = copy.deepcopy(ours)
    pairs = (
        (ours, DGD(ours, 0.1, exact, weight_decay=0.01, erase=0.0)),
        (theirs, torch.optim.SGD(theirs.parameters(), 0.1, weight_decay=0.01)),
    )
    for model, optimizer in pairs:
        for step in range(20):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            model(x).sin().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, "W")


@pytest.mark.parametrize("exact", [True, False])
def test_directions_orthogonal_to_the_inputs_are_untouched(exact):
    W, x = randn(4, 6), randn(3, 6)
    z = randn(6, 1)
    z = z - x.mT @ torch.linalg.solve(x @ x.mT, x @ z)
    new, _ = dgd_step(x, W, exact=exact)
    assert_close(new @ z, W @ z, "W z")


@pytest.mark.parametrize("orthonormal", [True, False])
def test_a_batch_is_one_sample_after_the_other_exactly_for_orthonormal_inputs(orthonormal):
    """Not in the paper: the batch form, reduction "sum". The sample's u is that of the first weights, as in (57)."""
    W = randn(4, 6)
    x = torch.linalg.qr(randn(6, 3))[0].mT if orthonormal else randn(3, 6)
    c = randn(3, 4)
    batch, _ = dgd_step(x, W, loss=lambda y: (c * y).sum(), reduction="sum")
    one_by_one = W
    for i in range(3):
        one_by_one, _ = dgd_step(x[i : i + 1], one_by_one, loss=lambda y, i=i: (c[i] * y).sum())
    assert torch.allclose(batch, one_by_one, rtol=1e-10, atol=1e-12) is orthonormal


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_the_first_order_form_stays_stable_for_any_inputs(size):
    """eta' lambda_max(mean x x^T) < 1: a step without gradient only shrinks W, along the inputs."""
    W, x = randn(4, 6), size * randn(20, 6)
    new, _ = dgd_step(x, W, lr=10.0, loss=lambda y: 0 * y.sum(), exact=False)
    assert 0 < new.norm() < W.norm()
