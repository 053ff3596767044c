"""Each ablation of Hope changes what it says, in its config, its boxes and its numbers, and nothing else."""

import json
import math
from dataclasses import asdict

import pytest

from nestling.models import build, from_config
from nestling.models.ablations import ABLATIONS, COUNTS, LEVELS, LOWEST
from nestling.testing import assert_close
from tests.models.tiny import read, text, tiny

PERIODS = {"periods": (4.0, 8.0, math.inf), "inner_lr": 0.05}
FIELDS = {
    "Hope": set(),
    "without DGD": {"dgd"},
    "without decay": {"decay"},
    "without CMS": {"periods"},
    "momentum": {"inner_rule"},
}


def hope(name="Hope"):
    return tiny("hope", **{**PERIODS, **ABLATIONS[name]})


def boxes(model):
    return {box.name: {k: v for k, v in vars(box).items() if k != "name"} for box in model.levels()}


def differences(name):
    """{box: fields that differ}; a box that one of them lacks differs in everything."""
    ours, theirs = boxes(hope(name)), boxes(hope())
    found = {}
    for box in ours.keys() | theirs.keys():
        a, b = ours.get(box, {}), theirs.get(box, {})
        fields = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        if fields:
            found[box.split(": ")[1]] = fields
    return found


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_config_differs_in_one_field(name):
    ours, theirs = asdict(hope(name).config), asdict(hope().config)
    assert {key for key in ours if ours[key] != theirs[key]} == FIELDS.get(name, {"adaptive"})


def test_the_boxes_differ_where_the_name_says():
    assert differences("Hope") == {}
    memories = {"k", "v", "eta", "alpha", "memory"}
    assert differences("without DGD") == dict.fromkeys(memories, {"rule"})
    assert differences("without decay") == dict.fromkeys(memories, {"half_life"})
    for name in ("k", "v", "eta", "alpha"):
        assert differences(f"without adaptive {name}") == {name: {"period", "half_life"}}
    assert set(differences("without self-modification")) == memories - {"memory"}
    assert set(differences("adaptive q")) == {"q"}
    momentum = differences("momentum")
    assert momentum and all("cms" in box and fields <= {"rule", "state_bytes"} for box, fields in momentum.items())
    cms = differences("without CMS")  # nothing waits for a write, so that no state is kept twice
    assert all("cms" in box or fields == {"state_bytes"} for box, fields in cms.items())


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name.startswith("without adaptive")])
def test_a_fixed_map_is_a_memory_that_stays_at_its_start(name):
    model, frozen = hope(name), name.split()[-1]
    _, state = read(model, text(2, 20))
    for block, mixer in zip(model.blocks, state.tree.mixers, strict=True):
        moved = mixer.running[0].abs().amax((0, 1, 3, 4))  # (M,)
        assert [n for n, m in zip(block.mixer.names, moved, strict=True) if m == 0] == [frozen]


def test_a_fixed_map_is_a_rate_of_zero():
    model, whole = hope("without adaptive k"), hope()
    for block in whole.blocks:
        block.mixer.rate_logit.data.view(2, -1)[:, 0] = -800.0  # sigmoid: exactly zero
    assert_close(read(model, text(2, 20))[0], read(whole, text(2, 20))[0], "logits")


def test_without_decay_is_a_gate_that_keeps_everything():
    model, whole = hope("without decay"), hope()
    assert set(dict(whole.named_parameters())) - set(dict(model.named_parameters())) == {
        f"blocks.{i}.mixer.alpha_bias" for i in range(2)
    }
    for block in whole.blocks:
        block.mixer.alpha_bias.data.fill_(1e3)
    ours = read(model, text(2, 20))[0]
    assert_close(ours, read(whole, text(2, 20))[0], "logits")
    assert float((ours - read(hope(), text(2, 20))[0]).abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["without DGD", "momentum"])
def test_equal_weights_write_otherwise(name):
    """The same parameters, and the same logits until something was written."""
    model, whole = hope(name), hope()
    assert model.state_dict().keys() == whole.state_dict().keys()
    ours, theirs = (read(m, text(2, 20))[0] for m in (model, whole))
    assert float((ours - theirs).abs().max()) > 1e-6
    first = 1 if name == "without DGD" else 8  # momentum: the second write is the first that has one
    assert_close(ours[:, :first], theirs[:, :first], "logits")


def test_adaptive_q_has_one_memory_more():
    model = hope("adaptive q")
    assert model.blocks[0].mixer.names == ("k", "v", "eta", "alpha", "q", "memory")
    _, state = read(model, text(2, 20))
    assert bool((state.tree.mixers[0].running[0].abs().amax((0, 1, 3, 4)) > 0).all())


def test_levels_have_the_count_and_the_lowest_period_of_their_name():
    assert len(LEVELS) == len(COUNTS) * len(LOWEST)
    for name, overrides in LEVELS.items():
        model = tiny("hope", **overrides)
        count, lowest = int(name.split()[0]), int(name.split()[-1])
        cms = [box for box in model.levels() if "blocks.0: cms" in box.name]
        assert [box.period for box in cms] == [lowest * 4**i for i in range(count)]
        assert set(overrides) == {"periods"}


def test_every_ablation_trains():
    for name in ABLATIONS:
        loss, state = hope(name).loss(text(2, 20))
        loss.backward()
        assert bool(loss.isfinite())
        assert state.writes.tolist() == ([[], []] if name == "without CMS" else [[4, 2], [4, 2]])


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_match_the_parameters_of_hope(name):
    shape = {"dim": 32, "depth": 2, "heads": 2, "vocab_size": 64}
    goal = build("hope", **shape).num_parameters()
    assert build("hope", match=goal, **shape, **ABLATIONS[name]).num_parameters() == pytest.approx(goal, rel=0.02)


def test_what_is_unknown_is_named():
    with pytest.raises(ValueError, match="adaptive=.* must name some of q, k, v, eta, alpha"):
        tiny("hope", adaptive=("k", "w"))


def test_an_ablation_survives_json():
    config = hope("without adaptive k").config
    assert from_config(json.loads(json.dumps(asdict(config)))).config == config
