"""Paper section 2: optimizers are memories of gradients. Numbers in brackets are equations of arXiv 2512.24695."""

import copy

import pytest
import torch
from torch import nn

from nestling.core.memory import MLPMemory
from nestling.core.objective import DotProduct, L2Regression, RobustLp, ValueLess
from nestling.core.rule import delta_momentum, dgd, gradient_descent
from nestling.optim import (
    DGD,
    DeepMomentum,
    DeltaMomentum,
    Diagonal,
    Generalised,
    Given,
    Kronecker,
    Momentum,
    Muon,
    PreconditionedMomentum,
    RuleOptimizer,
    generalised,
)
from nestling.optim.deep_momentum import powers
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


LINES = {
    "momentum": (generalised.momentum, lambda p: Momentum(p, 0.05, 0.8)),
    "gradient descent": (generalised.momentum, lambda p: Momentum(p, 0.05, 0.0)),
    "preconditioned": (
        generalised.preconditioned(lambda G: torch.diag(1.0 + torch.arange(len(G), dtype=G.dtype))),
        lambda p: PreconditionedMomentum(p, 0.05, 0.8, Given(lambda g: rows_scaled(g))),
    ),
    "delta momentum": (generalised.delta_momentum, lambda p: DeltaMomentum(p, 0.05, 0.8)),
    "delta momentum, literal": (
        generalised.delta(0.01, normalize=False),
        lambda p: DeltaMomentum(p, 0.05, 0.8, erase_rate=0.01, normalize=False),
    ),
}


def rows_scaled(g):
    """diag(1, 2, ...) G."""
    G = g.flatten(1) if g.dim() > 1 else g.reshape(-1, 1)
    return ((1.0 + torch.arange(len(G), dtype=g.dtype))[:, None] * G).reshape(g.shape)


@pytest.mark.parametrize("name", LINES)
def test_each_optimizer_is_a_line_of_the_generalised_form(name):
    """(35)-(37), (46)-(49): objective x retention x memory x output."""
    form, expected = LINES[name]
    kept = 0.0 if name == "gradient descent" else 0.8
    same(lambda p: Generalised(p, 0.05, form, momentum=kept), expected)


def test_a_linear_memory_read_through_newton_schulz_is_muon():
    """(42), (52): the same direction for m <- beta m + g and for the mean of g, which Newton-Schulz does not tell."""

    def matrices(make):
        torch.manual_seed(2)
        params = [randn(4, 4).requires_grad_(), randn(3, 3).requires_grad_()]
        optimizer = make(params)
        for _ in range(10):
            for p in params:
                p.grad = p.detach().sin() + 0.1 * randn(*p.shape)
            optimizer.step()
        return params

    muon = {"weight_decay": 0.0, "momentum": 0.9, "nesterov": False}
    ours = matrices(lambda p: Generalised(p, 0.05, generalised.muon, momentum=0.9))
    for W, expected in zip(ours, matrices(lambda p: Muon(p, 0.05, **muon)), strict=True):
        assert_close(W, expected, "W")


@pytest.mark.parametrize("n", [1, 3])
def test_the_weights_are_a_memory_of_their_own_surprise(n):
    """(29)-(31), (55), (58)-(60): dot product and L2 retention are SGD, L2 regression and L2 retention are DGD."""
    W, x = randn(4, 6), randn(n, 6)
    for options, rule in (({"erase": 0.0}, gradient_descent(0.7)), ({}, dgd(0.7))):
        new, minus_u = dgd_step(x, W, 0.7, reduction="sum", **options)
        assert_close(generalised.weights_step(W, x, -minus_u, DotProduct(), rule), new, "W")
    explicit = generalised.weights_step(W, x, -minus_u, L2Regression(), gradient_descent(0.7))
    assert_close(explicit, W - 0.7 * (W @ x.mT + minus_u.mT) @ x, "W, explicit")


def deep_by_hand(gradients, lr, alpha, eta, hidden, feature_map, output, regression):
    """DMGD with autograd on the inner loss: the steps of one matrix (out, in), rows as keys."""
    d = gradients[0].shape[1]
    first = MLPMemory(feature_map(torch.zeros(1, d)).shape[1], hidden).init(dtype=torch.float64)["W2"]
    W2, W1 = first, torch.zeros(hidden, d, dtype=torch.float64)
    last, steps = None, []
    for G in gradients:
        z = G / G.square().mean().sqrt()
        if last is not None:
            U2, U1 = W2.clone().requires_grad_(), W1.clone().requires_grad_()
            features = nn.functional.silu(feature_map(last) @ U2)
            loss = regression(last + features @ U1, z).sum() / len(z)
            g2, g1 = torch.autograd.grad(loss, [U2, U1])
            rate2 = eta / (1 + feature_map(last).square().sum(1).mean())
            rate1 = eta / (1 + features.detach().square().sum(1).mean())
            W2, W1 = first + alpha * (W2 - first) - rate2 * g2, alpha * W1 - rate1 * g1
        answer = z + nn.functional.silu(feature_map(z) @ W2) @ W1
        steps.append(lr * output(answer * G.square().mean().sqrt()))
        last = z
    return steps


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("feature_map", "output", "objective"),
    [
        (torch.clone, torch.clone, L2Regression()),
        (powers, torch.tanh, L2Regression()),
        (torch.clone, generalised.orthogonal, RobustLp(1.0)),
    ],
    ids=["plain", "higher-order keys, tanh", "robust, orthogonal"],
)
def test_deep_momentum_learns_by_the_gradient_of_its_inner_loss(feature_map, output, objective, transposed):
    """(50)-(52), against autograd; the shorter side of the matrix holds the keys."""
    gradients = [randn(7, 4) + 1 for _ in range(6)]
    expected = deep_by_hand(gradients, 0.3, 0.9, 0.5, 5, feature_map, output, objective.loss)
    W = torch.zeros((4, 7) if transposed else (7, 4), dtype=torch.float64, requires_grad=True)
    options = {"feature_map": feature_map, "output": output, "objective": objective, "hidden": 5}
    optimizer = DeepMomentum([W], 0.3, 0.9, inner_lr=0.5, **options)
    for G, step in zip(gradients, expected, strict=True):
        before, W.grad = W.detach().clone(), (G.mT if transposed else G).clone()
        optimizer.step()
        assert_close((before - W.detach()).mT if transposed else before - W.detach(), step, "step")


def test_deep_momentum_passes_what_repeats_and_damps_noise():
    """Its answer to a gradient that returns is closer to it than its answer to noise, whose next value is unknown."""
    W = torch.zeros(32, 8, dtype=torch.float64, requires_grad=True)
    direction = randn(32, 8)
    kept = {}
    for name, noise in (("returns", 0.0), ("noise", 1.0)):
        optimizer = DeepMomentum([W], 1.0)
        for _ in range(300):
            W.grad = noise * randn(32, 8) + (1 - noise) * direction
            before = W.detach().clone()
            optimizer.step()
        step = before - W.detach()
        kept[name] = float((step * W.grad).sum() / W.grad.square().sum())
    assert kept["returns"] > 0.99 and kept["noise"] < 0.7


def test_deep_momentum_keeps_what_it_says():
    """The last gradient and hidden (d + width) numbers, whatever the longer side."""
    for shape, d in (((50, 6), 6), ((6, 50), 6), ((7,), 1), ((), 1), ((4, 3, 2, 2), 4)):
        W = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        optimizer = DeepMomentum([W], 0.1, hidden=5, feature_map=powers)
        W.grad = torch.ones_like(W)
        optimizer.step()
        state = optimizer.state[W]
        assert sum(x.numel() for x in state["memory"].values()) == 5 * (d + 2 * d)
        assert state["last"].numel() == W.numel()


def test_the_printed_example_of_deep_momentum_answers_no_descent_direction():
    """(50) with <m(u), 1>: whatever was written, every answer of a value-less MLP lies along the vector of ones."""
    memory = MLPMemory(4, 6)
    params = memory.init(dtype=torch.float64)
    params["W1"] = torch.zeros_like(params["W1"])
    rule = gradient_descent(0.1)
    for _ in range(5):
        params, _ = memory.write(params, None, randn(3, 4), None, objective=ValueLess(), rule=rule)
    queries = randn(2, 4)
    answers = memory.read(params, queries) - queries
    assert_close(answers - answers.mean(-1, keepdim=True), torch.zeros_like(answers), "beside the ones")
