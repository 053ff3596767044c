"""What lets ranks gather a block pass by pass (docs/scale.md): its states are no views of weights, a pass uses all."""

import pytest
import torch

from nestling.core.state import detach, tensors
from nestling.models import NAMES, build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 3, 8, 20])
def test_states_are_no_views_of_weights_and_every_weight_has_a_gradient(name: str, length: int) -> None:
    model = build(name, dim=16, depth=1, heads=2, chunk_size=8)
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    mixers = [None]
    for _ in range(3):
        model.zero_grad()
        hidden, mixers = model.body(torch.arange(2 * length).view(2, length), mixers)
        hidden.square().sum().backward()
        assert all(p.grad is not None for p in model.blocks.parameters())
        assert not any(x.untyped_storage().data_ptr() in memory for x in tensors(mixers))
        mixers = detach(mixers)
