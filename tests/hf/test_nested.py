"""Levels inside each other on the same weights (`assign="nested"`): W + D_slow + D_fast, against loops by hand."""

import math

import pytest
import torch

from tests.hf.needs import need

need("transformers")

import nestling  # noqa: E402
from nestling.hf import convert_to_cms  # noqa: E402
from nestling.hf.converted import ConvertedForCausalLM  # noqa: E402
from nestling.memories.continuum import InnerRule, continuum_levels  # noqa: E402
from nestling.models import State  # noqa: E402
from tests.hf.small import cache_of, converted, plain, text  # noqa: E402
from tests.hf.test_outer import gradients, slope, tiny  # noqa: E402

FAST, SLOW, FIRST, LENGTH = 4, 8, 12, 22  # tokens; the second document starts after FIRST
PLAIN = InnerRule(relative=False, bound=math.inf, kappa=0)
PASSING = InnerRule(relative=False, bound=math.inf, kappa=0, reset="document")
RATES = (0.5, 0.25)


def borders(rows=1):
    new = torch.zeros(rows, LENGTH, dtype=torch.bool)
    new[:, FIRST] = True
    return new


def nested(family="Llama", rule=(PASSING, PLAIN), **options):
    return converted(family, (FAST, SLOW), rates=RATES, rule=rule, assign="nested", **options)


@torch.no_grad()
def by_hand(tokens):
    """Logits of a reading by torch and transformers alone: F and S for every weight of an MLP."""
    start, now = plain().double(), plain().double()
    weights = [(w, dict(start.named_parameters())[name]) for name, w in now.named_parameters() if ".mlp." in name]
    fast, slow = ([torch.zeros_like(w) for w, _ in weights] for _ in range(2))
    waiting, count, clock, logits = [torch.zeros_like(w) for w, _ in weights], 0, 0, []
    for document in tokens.split([FIRST, LENGTH - FIRST], 1):
        fast = [torch.zeros_like(f) for f in fast]
        cache = {}
        for begin in range(0, document.shape[1], FAST):
            piece = document[:, begin : begin + FAST]
            for (w, w0), f, s in zip(weights, fast, slow, strict=True):
                w.copy_(w0 + f + s)
            with torch.enable_grad():
                now.zero_grad()
                out = now(piece, use_cache=True, **cache)
                targets = document[0, begin + 1 : begin + FAST + 1]
                torch.nn.functional.cross_entropy(out.logits[0, : len(targets)], targets, reduction="sum").backward()
            logits.append(out.logits)
            cache = {name: detached(kept) for name, kept in cache_of(now, out).items()}
            if piece.shape[1] < FAST:
                continue
            count, clock = count + len(targets), clock + FAST
            for i, (w, _) in enumerate(weights):
                fast[i] = fast[i] - RATES[0] * w.grad / len(targets)
                waiting[i] = waiting[i] + w.grad
                if clock == SLOW:
                    slow[i] = slow[i] - RATES[1] * waiting[i] / count
                    waiting[i] = torch.zeros_like(waiting[i])
            if clock == SLOW:
                count, clock = 0, 0
    return torch.cat(logits, 1)


def detached(cache):
    """What the next segment sees of this one is a constant."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache


@torch.no_grad()
def test_the_weights_in_force_are_the_sum_and_the_fast_level_starts_again_from_the_slow_one():
    tokens = text(1, LENGTH)
    model = convert_to_cms(
        plain().double(), (FAST, SLOW), assign="nested", rates=RATES, rule=(PASSING, PLAIN), calibrate=False
    )
    out = model.reader(tokens, new_document=borders())
    torch.testing.assert_close(out.logits, by_hand(tokens), rtol=0, atol=1e-9)
    assert out.state.writes.tolist() == [[5, 2]]
    fresh = plain().double()(tokens[:, FIRST:]).logits
    difference = (out.logits[:, FIRST : FIRST + FAST] - fresh[:, :FAST]).abs().amax()
    assert difference > 1e-4, "the slow level kept nothing of the first document"


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@torch.no_grad()
def test_the_function_is_the_same_until_a_level_writes(family):
    tokens, before = text(2, LENGTH), plain(family)(text(2, LENGTH)).logits
    model = nested(family)
    assert torch.equal(model(tokens).logits, before)
    still = converted(family, (FAST, SLOW), rates=0.0, assign="nested")(tokens, learn=True)
    torch.testing.assert_close(still.logits, before, rtol=0, atol=2e-6)
    assert still.state.writes.tolist() == [[5, 2]] * 2
    boxes = nestling.levels(model)
    assert sum(box.parameters for box in boxes) == sum(p.numel() for p in model.parameters())
    assert sorted(box.period for box in boxes if "cms" in box.name) == [FAST, FAST, SLOW, SLOW]


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@torch.no_grad()
def test_cuts_and_rows_of_other_ages_change_nothing(family):
    model, tokens, new = nested(family), text(2, LENGTH), borders(2)
    whole = model.reader(tokens, new_document=new)
    state, parts = None, []
    for part, border in zip(tokens.split([5, 6, 1, 10], 1), new.split([5, 6, 1, 10], 1), strict=True):
        out = model.reader(part, state, new_document=border)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=0, atol=2e-6)
    torch.testing.assert_close(state.clocks, whole.state.clocks)
    old = [model.reader(tokens[:1, :3]).state, model.reader(tokens[1:, :14], new_document=new[1:, :14]).state]
    on = model.reader(tokens, State.stack(old))
    for row, one in enumerate(old):
        own = model.reader(tokens[row : row + 1], one)
        torch.testing.assert_close(on.logits[row : row + 1], own.logits, rtol=0, atol=2e-6)
    bound = sum(box.state_bytes for box in model.levels())
    assert whole.state.select([0]).nbytes <= bound


@torch.no_grad()
def test_files_of_states_and_models(tmp_path):
    model, tokens = nested(), text(1, 14)
    state = model(tokens, learn=True).state
    nestling.save_state(state, tmp_path / "state")
    model.save_pretrained(tmp_path / "model")
    back = ConvertedForCausalLM.from_pretrained(tmp_path / "model").eval()
    again = back(tokens, state=nestling.load_state(tmp_path / "state"), learn=True)
    assert torch.equal(again.logits, model(tokens, state=state, learn=True).logits)
    assert [level.rule.reset for level in continuum_levels(back).values()] == ["never", "document"] * 2


@torch.no_grad()
def test_calibration_sees_every_map_once():
    old = text(3, 24)
    shared = nested(rule=None, calibrate=True, old_text=old)
    alone = converted(periods=(FAST,), calibrate=True, old_text=old)
    for model in (shared, alone):
        model.calibrate(text(2, 24, seed=5), keep=0.5)
    expected = next(iter(continuum_levels(alone).values()))
    for level in list(continuum_levels(shared).values())[:2]:
        torch.testing.assert_close(level.inner_unit, expected.inner_unit)
        for ours, theirs in zip(level.maps.values(), expected.maps.values(), strict=True):
            torch.testing.assert_close(ours.inner_keys, theirs.inner_keys)


def test_the_defaults_are_what_was_measured():
    """recipes/slow_levels.py: the same rates and half-lives per token for every slow period."""
    for slow, rate, decay in ((4096, 2.56, 0.2), (256, 0.16, 0.01385), (math.inf, 0.16, 1.0)):
        made = converted(periods=(256, slow), rates=None, assign="nested", calibrate=True, old_text=text(2, 24))
        fast, last = made.config.rules()
        assert (fast.rate, fast.decay, fast.reset) == (0.64, 0.0, "document")
        assert last.rate == pytest.approx(rate) and last.decay == pytest.approx(decay, abs=1e-5)
        assert last.reset == "never"
    (alone,) = converted(
        periods=(256,), rates=None, assign="nested", calibrate=True, old_text=text(2, 24)
    ).config.rules()
    (plain_,) = converted(periods=(256,), rates=None, calibrate=True, old_text=text(2, 24)).config.rules()
    assert alone == plain_


@pytest.mark.parametrize(
    "periods, options", [((8, 8), {}), ((FAST, SLOW), dict(bptt=9, outer="sequence"))], ids=["first-order", "exact"]
)
def test_each_learned_rate_gets_its_own_slope(periods, options):
    """First-order after one write of each level, where that is the slope itself; and exact through several writes."""
    model, tokens = tiny(periods=periods, assign="nested", **options), text(1, 15)
    found = gradients(model, tokens)
    names = [name for name in found if name.endswith("inner_log_rate")]
    assert len(names) == 4
    for name in names:
        assert found[name].item() == pytest.approx(slope(model, name, 0, tokens), rel=1e-4), name


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(rule=[InnerRule(kappa=1), InnerRule(kappa=2)]), "give both the same kappa"),
        (dict(rule=[InnerRule()] * 3), "3 for 2 periods"),
        (dict(assign="stacked"), '"nested"'),
    ],
)
def test_levels_that_do_not_fit_inside_each_other(options, words):
    with pytest.raises(ValueError, match=words):
        converted(**{"assign": "nested"} | options)
