"""Names, sizes, matching, initialisation, calibration, and errors of one line."""

import dataclasses
import json
import math

import pytest
import torch

from nestling.models import NAMES, PRESETS, build, config_of, count, from_config
from tests.models.tiny import text, tiny

SIZES = {"tiny": 1e6, "small": 10e6, "base": 160e6, "340m": 340e6, "760m": 760e6, "1.3b": 1.3e9}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_size_of_their_name(preset):
    assert count(config_of("transformer", preset)) == pytest.approx(SIZES[preset], rel=0.15)
    assert count(config_of("hope-attention", preset)) == pytest.approx(SIZES[preset], rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_plain_read_gets_a_gradient_at_initialisation(name):
    """149 tokens; parameters that act only in writes have `inner` in their name, and no others do."""
    options = {"periods": (16, 32, math.inf), "inner_learned": True} if name.startswith("hope") else {}
    torch.manual_seed(0)
    model = build(name, dim=32, depth=2, heads=2, vocab_size=64, **options)
    tokens = torch.randint(64, (1, 149))
    logits = model(tokens, learn=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    for parameter, p in model.named_parameters():
        moved = p.grad is not None and float(p.grad.abs().max()) > 0
        assert moved == ("inner" not in parameter), parameter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("goal", [400_000, 500_000, "transformer", "hope"])
def test_match_is_within_two_percent(name, goal):
    shape = {"dim": 96, "depth": 3, "heads": 2}
    model = build(name, match=goal, **shape)
    wanted = goal if isinstance(goal, int) else build(goal, **shape).num_parameters()
    assert abs(model.num_parameters() - wanted) <= 0.02 * wanted


def test_a_config_survives_json():
    model = tiny("hope", periods=(4, 8, math.inf), inner_lr=(0.1, 0.2, 0.3))
    again = from_config(json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again.config == model.config
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_k_periods_share_the_parameters_of_one_mlp():
    one, three = (build("hope-attention", periods=p, inner_kappa=0.0) for p in ((math.inf,), (4, 8, math.inf)))
    norms = 2 * 4 * 128  # a norm more per level and block
    assert three.num_parameters() == one.num_parameters() + norms


def test_calibration_touches_only_inner_buffers_and_needs_no_gradient():
    model = tiny(periods=(4, 8, math.inf))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with torch.inference_mode():
        model.calibrate(text(3, 30))
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed and all("inner" in n for n in changed)
    assert all(p.grad is None for p in model.parameters())


BAD = {
    "heads": (dict(dim=10, heads=4), "heads=4"),
    "odd": (dict(dim=9, heads=1), "dim=9"),
    "multiple": (dict(periods=(4, 6)), "not a multiple"),
    "order": (dict(periods=(8, 4)), "fast to slow"),
    "zero": (dict(periods=(0, 4)), ">= 1"),
    "none": (dict(periods=()), "empty"),
    "rates": (dict(periods=(4, 8), inner_lr=(0.1,)), "1 rates for 2 periods"),
    "negative": (dict(periods=(4, 8), inner_lr=-0.1), "rate=-0.1"),
    "learned zero": (dict(periods=(4,), inner_lr=0.0, inner_learned=True), None),
    "key": (dict(perods=(4,)), "unknown option 'perods'"),
    "preset": (dict(preset="huge"), "unknown preset 'huge'"),
    "rule": (dict(inner_rule="adamw"), "inner_rule='adamw'"),
    "outer": (dict(outer="token"), "outer='token'"),
    "window": (dict(window=0), "window=0"),
    "vocab": (dict(vocab_size=0), "vocab_size=0"),
    "hidden": (dict(hidden=1, periods=(4, 8)), "too small"),
    "match": (dict(match=1000), "match=1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_one_line_with_a_remedy(case):
    options, says = BAD[case]
    if says is None:
        assert build("hope-attention", dim=16, depth=1, heads=1, **options).config.inner_learned
        return
    with pytest.raises(ValueError) as error:
        build("hope-attention", **options)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("hope")])
def test_a_baseline_has_no_periods(name):
    with pytest.raises(ValueError, match=f"{name}: periods=.* use hope or hope-attention"):
        build(name, periods=(4, math.inf))


def test_names_are_known():
    with pytest.raises(ValueError, match="unknown model 'mamba'"):
        build("mamba")


def test_bad_tokens_are_one_line():
    model, tokens = tiny(), text(2, 6)
    wrong = tokens.clone()
    wrong[1, 2] = 11
    for bad, says in (
        (wrong, "id 11 is outside"),
        (-tokens - 1, "outside"),
        (tokens.int(), "int64"),
        (tokens[0], r"\(B, T\)"),
    ):
        with pytest.raises(ValueError, match=says):
            model(bad)
    with pytest.raises(ValueError, match="mask must be"):
        model(tokens, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="targets: id 11"):
        model.loss(tokens, wrong)
