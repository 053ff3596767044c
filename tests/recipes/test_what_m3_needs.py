"""The variants are what their names say."""

import torch
from torch import nn

from nestling import optim
from recipes.what_m3_needs import FEW, VARIANTS, Joined


def test_joined_sums_its_memories_before_newton_schulz() -> None:
    """With a slow memory of the fast one's decay and weight 1 the sum is twice the fast one (without nesterov's look
    ahead), and Newton-Schulz does not see the factor: Muon."""
    W = torch.randn(4, 6, dtype=torch.float64)
    params = [nn.Parameter(W.clone()), nn.Parameter(W.clone()), nn.Parameter(W.clone())]
    made = [
        Joined(params[:1], 0.1, (0.0, None), [(1, 0.0, 1.0)]),
        Joined(params[1:2], 0.1, (0.0, None), [(1, 0.5, 1.0)]),
        optim.Muon(params[2:], 0.1, momentum=0.0),
    ]
    for _ in range(3):
        g = torch.randn_like(W)
        for p, optimizer in zip(params, made, strict=True):
            p.grad = g
            optimizer.step()
    torch.testing.assert_close(params[0], params[2])
    assert not torch.allclose(params[1], params[2])  # one that remembers moves it elsewhere


def test_the_variants_build() -> None:
    assert set(FEW) < set(VARIANTS)
    for make in VARIANTS.values():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        optimizer = make(model, 1e-2)
        before = model[0].weight.detach().clone()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, model[0].weight)
