"""The shared part of the optimizers: rules with named dials, clocks, checks."""

import pytest
import torch

from nestling import optim
from nestling.core.rule import chain, decay, gradient_descent, momentum
from nestling.optim import RuleOptimizer
from nestling.testing import assert_close

SHAPES = ((), (5,), (4, 3), (2, 3, 4), (2, 3, 2, 2))


def parameters() -> list[torch.Tensor]:
    made = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    made.append(torch.randn(3, 6, dtype=torch.float64).mT)  # not contiguous
    made.append(torch.randn(3, 2, 4, dtype=torch.float64).permute(2, 0, 1))
    return [p.requires_grad_() for p in made]


def test_a_rule_is_an_optimizer_for_parameters_of_any_shape() -> None:
    ours = parameters()
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    rule = chain(momentum("beta"), gradient_descent("lr"))
    pairs = (
        (RuleOptimizer(ours, rule, lr=0.1, beta=0.9), ours),
        (torch.optim.SGD(theirs, lr=0.1, momentum=0.9), theirs),
    )
    for optimizer, params in pairs:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            sum((p - 1).pow(4).sum() for p in params).mul(1e-2).backward()
            optimizer.step()
            schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q)


def test_a_closure_gives_its_loss_and_a_parameter_without_gradient_stays() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = RuleOptimizer([p, q], chain(gradient_descent("lr"), decay(0.5)), lr=0.5)

    def closure() -> float:
        loss = p.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert p.tolist() == [0.0] * 3 and q.tolist() == [1.0] * 3
    assert optimizer.state[p]["step"] == 1 and q not in optimizer.state


def test_what_cannot_be_written_is_refused() -> None:
    rule = gradient_descent("lr")
    with pytest.raises(ValueError, match="complex64"):
        RuleOptimizer([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], rule, lr=0.1)
    with pytest.raises(ValueError, match="lr is -1"):
        RuleOptimizer([torch.zeros(2, requires_grad=True)], rule, lr=-1.0)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = RuleOptimizer(embedding.parameters(), rule, lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("make", [lambda ps: optim.Momentum(ps, 0.1), lambda ps: optim.Muon(ps, 0.1)])
def test_a_step_that_torch_compile_traces_is_the_same(make) -> None:
    """Tracing alone: what a backend makes of the graph is torch's matter, and takes a compiler."""
    one, other = (
        [torch.nn.Parameter(p.clone()) for p in start] for start in [[torch.ones(3, 4), torch.ones(4, 3)]] * 2
    )
    plain, traced = make(one), make(other)
    step = torch.compile(traced.step, backend="eager")
    for i in range(3):
        for p, q in zip(one, other, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        plain.step()
        step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    torch.compiler.reset()
