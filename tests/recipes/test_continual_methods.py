"""Methods that learn one task after the other: each against a small case worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memories.continuum import ContinuumLevel, FastLinear, InnerRule
from recipes.continual_methods.cms import CmsWrites, as_one_stream
from recipes.continual_methods.ewc import ElasticWeights
from recipes.continual_methods.fine_tuning import FineTuning, batches
from recipes.continual_methods.gaussian import FourierFeatures, Gaussians
from recipes.continual_methods.memory_head import MemoryHead
from recipes.continual_methods.replay import Reservoir

Pair = tuple[Tensor, Tensor]


def pairs(count: int, seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, generator=generator), torch.randn(2, generator=generator)) for _ in range(count)]


def squares(model: nn.Module, examples: Sequence[Pair]) -> Tensor:
    x, y = (torch.stack(part) for part in zip(*examples, strict=True))
    return (model(x) - y).square().sum(-1).mean()


# --- fine-tuning, EWC, replay -------------------------------------------------------------------------------------


def test_batches_are_consecutive_and_the_last_may_be_short() -> None:
    assert batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_fine_tuning_takes_adams_steps_in_order() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(mine.state_dict())
    data, stored = pairs(4), []
    FineTuning(lambda b: squares(mine, b), mine.parameters(), lr=0.01, batch=2, stored=stored.append).learn(data)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for batch in (data[:2], data[2:]):
        optimizer.zero_grad()
        squares(theirs, batch).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(mine.weight, theirs.weight)
    assert stored == [data[:2], data[2:]]


def test_the_penalty_of_ewc_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    data = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    ewc = ElasticWeights(lambda b: (torch.stack(list(b)) @ weight).mean(), [weight], strength=4.0, examples=2)
    assert ewc.penalty() == 0
    ewc.consolidate(data)  # gradients of single examples: (1, 0) and (0, 3)
    assert torch.equal(ewc.fisher[0], torch.tensor([0.5, 4.5]))
    assert ewc.penalty() == 0
    with torch.no_grad():
        weight += torch.tensor([2.0, 1.0])
    assert ewc.penalty().item() == pytest.approx(4 / 2 * (0.5 * 4 + 4.5 * 1))
    ewc.consolidate(data[:1])  # a second task adds its Fisher, and the anchor moves
    assert torch.equal(ewc.fisher[0], torch.tensor([1.5, 4.5]))
    assert ewc.penalty() == 0


def test_a_reservoir_holds_every_example_equally_often() -> None:
    counts = torch.zeros(30)
    for seed in range(400):
        held = Reservoir(6, seed=seed)
        for i in range(30):
            held.add(i)
        assert len(set(held.held)) == 6
        counts[held.held] += 1
    expected = 400 * 6 / 30
    assert ((counts - expected).abs() < 5 * math.sqrt(expected * 0.8)).all()


def test_replay_draws_only_what_came_before_and_by_seed() -> None:
    first, second = Reservoir(5, seed=3), Reservoir(5, seed=3)
    assert first.mixed([0, 1, 2]) == []
    drawn = first.mixed([3, 4, 5])
    assert sorted(drawn) == [0, 1, 2]
    second.mixed([0, 1, 2])
    assert second.mixed([3, 4, 5]) == drawn and first.held == second.held


# --- memories in closed form --------------------------------------------------------------------------------------


def test_the_memory_head_is_ridge_regression_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 4
    order = torch.randperm(40, generator=generator)
    heads = [MemoryHead(5, 4, ridge=0.7), MemoryHead(5, 4, ridge=0.7)]
    for start in range(0, 40, 10):
        heads[0].write(x[start : start + 10], labels[start : start + 10])
        heads[1].write(x[order][start : start + 10], labels[order][start : start + 10])
    keys = torch.cat([x, torch.ones(40, 1)], 1).double()
    ridge = torch.linalg.solve(
        keys.T @ keys + 0.7 * torch.eye(6, dtype=torch.float64), keys.T @ F.one_hot(labels, 4).double()
    )
    for head in heads:
        torch.testing.assert_close(head.weight, ridge, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(heads[0].read(x), (keys @ ridge).float())


def test_lda_equals_the_densities_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64) + labels[:, None]
    memory = Gaussians(4, 5)
    for part in (slice(0, 25), slice(25, 60)):
        memory.write(x[part], labels[part])
    means = torch.stack([x[labels == k].mean(0) for k in range(3)])
    inside = (x - means[labels]).T @ (x - means[labels]) / 60
    covariance = inside + 0.1 * inside.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(memory.covariance(0.1), covariance)
    densities = torch.stack([torch.distributions.MultivariateNormal(mean, covariance).log_prob(x) for mean in means], 1)
    scores = memory.discriminants(x, 0.1)
    assert torch.isneginf(scores[:, 3:]).all()  # classes that were never seen
    torch.testing.assert_close(scores[:, :3].log_softmax(1), densities.log_softmax(1))
    assert torch.equal(memory.nearest_mean(x).argmax(1), torch.cdist(x, means).argmin(1))


def test_fourier_features_multiply_to_the_kernel() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = FourierFeatures(4, 20_000, width=1.5, seed=0)(x)
    kernel = torch.exp(-torch.cdist(x, x).square() / (2 * 4 * 1.5**2))
    assert (z @ z.T - kernel).abs().max() < 0.05


# --- CMS ----------------------------------------------------------------------------------------------------------


def level(period: int, **rule: float) -> ContinuumLevel:
    torch.manual_seed(0)
    made = InnerRule(rate=0.1, relative=False, bound=math.inf, kappa=0.0, **rule)  # type: ignore[arg-type]
    return ContinuumLevel(FastLinear(3, 2), period=period, rule=made)


def test_a_cms_with_period_of_a_batch_is_sgd_on_the_mean_loss() -> None:
    model, plain = level(2), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        plain.weight.copy_(model.body.weight)
    before = model.body.weight.clone()
    as_one_stream(model)
    method, data = CmsWrites(model, lambda b: squares(model, b), batch=2), pairs(6)
    method.learn(data)
    for batch in batches(data, 2):
        (gradient,) = torch.autograd.grad(squares(plain, batch), plain.weight)
        with torch.no_grad():
            plain.weight -= 0.1 * gradient
    with torch.no_grad(), method.reading():
        torch.testing.assert_close(squares(model, data), squares(plain, data))
    assert torch.equal(model.maps[""].weight, before)  # only fast weights moved
    assert method.moved()[""] > 0


def test_a_slower_level_writes_the_mean_of_several_batches_once() -> None:
    model = level(6)
    as_one_stream(model)
    method, data = CmsWrites(model, lambda b: squares(model, b), batch=2), pairs(6)
    method.learn(data[:4])
    assert method.state[""].writes.item() == 0 and not method.state[""].delta
    method.learn(data[4:])
    assert method.state[""].writes.item() == 1
    weight = model.maps[""].weight.detach().clone().requires_grad_()
    x, y = (torch.stack(part) for part in zip(*data, strict=True))
    (gradient,) = torch.autograd.grad((x @ weight.T - y).square().sum(-1).mean(), weight)
    torch.testing.assert_close(method.state[""].delta[""].to_dense()[0], -0.1 * gradient)


def test_rows_of_a_batch_share_one_stream() -> None:
    model = level(4)
    x = torch.randn(4, 5, 3)
    alone = model(x)
    as_one_stream(model)
    torch.testing.assert_close(model(x), alone)
