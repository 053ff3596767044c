"""What our models declare about their levels equals what is observed: parameters, writes on the token clock, bytes."""

import math

import pytest
import torch

import nestling
from nestling.core.state import nbytes
from nestling.models import NAMES, LanguageModel, build

CHUNK, PERIODS, LENGTH = 4, (4, 12, math.inf), 40


def small(name: str) -> LanguageModel:
    periods = PERIODS if name.startswith("hope") else (math.inf,)
    return build(name, dim=16, depth=2, heads=2, vocab_size=11, chunk_size=CHUNK, periods=periods, inner_lr=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_belongs_to_one_box(name: str) -> None:
    model = small(name)
    boxes = nestling.levels(model, torch.optim.AdamW(model.parameters()))
    assert boxes.parameters == model.num_parameters()
    assert {(box.clock, box.period) for box in boxes.on("step")} == {("step", 1)}
    assert [box for box in boxes if box.name == "AdamW.weights"][0].elements == model.num_parameters()


@pytest.mark.parametrize("name", NAMES)
def test_fast_weights_are_written_when_their_level_is_due(name: str) -> None:
    model = small(name)
    tokens = torch.randint(11, (2, LENGTH))
    boxes = nestling.levels(model)
    continuum = [box for box in boxes if box.name.startswith("blocks.1: cms")]
    assert [box.period for box in continuum] == sorted(box.period for box in continuum)
    state = None
    for count in range(1, LENGTH + 1):
        with torch.no_grad():
            state = model(tokens[:, count - 1 : count], state).state
        # A segment closes when the next token arrives; a frozen level has no column, as it keeps nothing.
        declared = [box.writes(count - 1) for box in continuum if math.isfinite(box.period)]
        assert state.writes.tolist() == [declared, declared], count
    assert declared == ([9, 3] if name.startswith("hope") else [])
    assert continuum[-1].writes(10**9) == 0


@pytest.mark.parametrize("name", NAMES)
def test_state_stays_within_the_declared_bytes(name: str) -> None:
    model = small(name)
    boxes = nestling.levels(model).on("token")
    continuum = sum(box.state_bytes or 0 for box in boxes if ": cms" in box.name)
    with torch.no_grad():
        state = model(torch.randint(11, (2, 100))).state
    assert 0 < nbytes(state.tree.fast) / 2 <= continuum if name.startswith("hope") else continuum == 0


def test_attention_has_period_zero_and_a_state_that_grows() -> None:
    for name, window in (("transformer", None), ("hope-attention", 8)):
        model = build(name, dim=16, depth=1, heads=2, vocab_size=11, window=window)
        (box,) = (box for box in nestling.levels(model) if box.period == 0)
        with torch.no_grad():
            sizes = [nbytes(model(torch.randint(11, (1, n))).state.tree.mixers) for n in (20, 40, 80)]
        if window is None:
            assert box.state_bytes is None
            assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0
        else:
            assert box.state_bytes is not None and max(sizes) <= box.state_bytes
            assert len(set(sizes)) == 1


def test_memories_of_the_self_modifying_layer_are_written_at_chunk_borders() -> None:
    model = small("hope")
    declared = {box.name.split(": ")[1]: box for box in nestling.levels(model) if box.name.startswith("blocks.0: ")}
    names = model.blocks[0].mixer.names
    tokens = torch.randint(11, (1, LENGTH))
    state, before = None, None
    changed: dict[str, list[int]] = {name: [] for name in names}
    for count in range(1, 18):
        with torch.no_grad():
            state = model(tokens[:, count - 1 : count], state, learn=False).state
        mixer = state.tree.mixers[0]
        used = [torch.cat([d.flatten(-2) for d in part], -1) for part in (mixer.anchor, mixer.running)]
        now = torch.stack([used[declared[n].period == 1][:, :, i] for i, n in enumerate(names)], 2)  # what is used next
        for i, name in enumerate(names):
            if before is not None and not torch.equal(now[:, :, i], before[:, :, i]):
                changed[name].append(count)
        before = now
    generators = [name for name in names if declared[name].period != 1]
    assert len(generators) >= 4
    assert all(changed[n] == [c for c in range(1, 18) if c % declared[n].period == 0] for n in generators)
    assert all(math.isclose(declared[n].half_life, t) for n, t in model.blocks[0].mixer.half_lives().items())
