"""Every optimizer of the recipes builds over a model, and lowers the loss of a small net in a few steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.optimizer_zoo import FACTOR, ZOO, fade


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("name", ZOO)
def test_it_lowers_the_loss_of_a_small_net(name: str) -> None:
    model, x = net(), torch.randn(64, 8)
    labels = x[:, :4].argmax(1)
    optimizer = ZOO[name].make(model, ZOO[name].default)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_every_optimizer_has_the_same_number_of_rates() -> None:
    for entry in ZOO.values():
        assert len(entry.rates) == 3 and entry.rates[1] == entry.default
        assert entry.rates[2] / entry.rates[0] == pytest.approx(FACTOR**2)


def test_fading_takes_the_same_share_of_every_matrix_and_nothing_of_vectors() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    fade(model, 0.25)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was * 0.75 if p.dim() > 1 else was)
