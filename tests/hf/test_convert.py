"""convert_to_cms: the same function until a level writes, for every family; then what the paper says."""

import math
from functools import partial

import pytest
import torch

from tests.hf.needs import need

need("transformers")

import transformers  # noqa: E402

import nestling  # noqa: E402
from nestling.core.state import tensors  # noqa: E402
from nestling.hf import convert_to_cms  # noqa: E402
from nestling.hf.own_text import own_text  # noqa: E402
from nestling.memories.continuum import InnerRule, continuum_levels, fast_weights  # noqa: E402
from nestling.models import State  # noqa: E402
from tests.hf.small import CONTEXT, FAMILIES, GROUPED, SHAPE, cache_of, converted, plain, text  # noqa: E402

TOLERANCE = 2e-6  # on logits, float32: matrix shapes change rounding


def close(a, b, name):
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_function_is_the_same_until_a_level_writes(family):
    tokens, model = text(2, 21), plain(family)
    before = model(tokens, labels=tokens)
    with_levels = convert_to_cms(model, (8, 16), rates=0.05, calibrate=False)
    after = with_levels(tokens, labels=tokens)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    learned = with_levels(tokens, learn=True)
    close(learned.logits[:, :8], before.logits[:, :8], "before the first write")
    assert not torch.allclose(learned.logits[:, 8:], before.logits[:, 8:], atol=1e-4), "nothing was learned"
    assert torch.equal(with_levels(tokens).logits, before.logits), "learning left a trace in the model"
    assert [box.period for box in with_levels.levels() if box.period] == [8, 16]
    assert sum(1 for box in with_levels.levels() if box.period == 0) == 2  # attention


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cuts_padding_and_rows_of_other_ages_change_nothing(family):
    model, tokens = converted(family), text(2, 21)
    whole = model(tokens, learn=True)
    first = model(tokens[:, :6], learn=True)
    rest = model(tokens[:, 6:], learn=True, state=first.state)
    close(torch.cat([first.logits, rest.logits], 1), whole.logits, "cut")
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    padded = model(tokens, attention_mask=mask, learn=True)
    alone = model(tokens[:1, 5:], learn=True)
    close(padded.logits[:1, 5:], alone.logits, "left padding")
    close(padded.logits[1:], whole.logits[1:], "the row beside it")
    assert padded.state.tokens.tolist() == [16, 21]
    old = [model(tokens[:1, :3], learn=True).state, model(tokens[1:, :14], learn=True).state]
    on = model(text(2, 9, seed=3), learn=True, state=State.stack(old))
    for row, state in enumerate(old):
        own = model(text(2, 9, seed=3)[row : row + 1], learn=True, state=state)
        close(on.logits[row : row + 1], own.logits, f"row {row} of another age")


@torch.no_grad()
def test_a_write_is_a_step_of_gradient_descent():
    model, tokens = plain().double(), text(1, 13)
    rule = InnerRule(relative=False, bound=math.inf, kappa=0)
    learned = convert_to_cms(plain().double(), (8, 8), rates=0.5, rule=rule, calibrate=False)(tokens, learn=True)
    start = model(tokens[:, :8], use_cache=True)
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :8]).logits[0], tokens[0, 1:9])
        loss.backward()
    for name, weight in model.named_parameters():
        if ".mlp." in name:
            weight -= 0.5 * weight.grad
    later = model(tokens[:, 8:], **cache_of(model, start))
    torch.testing.assert_close(learned.logits[:, :8], start.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(learned.logits[:, 8:], later.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@torch.no_grad()
def test_a_text_may_be_longer_than_the_context(family):
    model, tokens = converted(family, context=16), text(2, 43)
    tokens[0, 0] = 1  # begins with the begin-of-text id, the other row does not
    whole = model(tokens, learn=True)
    state, parts = None, []
    for part in tokens.split([15, 2, 1, 9, 16], 1):
        out = model(part, learn=True, state=state)
        state = out.state
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole.logits, "cut")
    mixed = State.stack([model(tokens[:1, :10], learn=True).state, model(tokens[1:, :31], learn=True).state])
    more = model(tokens[:, :12], learn=True, state=mixed).logits
    alone = model(tokens[:1, :12], learn=True, state=mixed.select([0])).logits
    close(more[:1], alone, "rows of different age refill on their own")
    frozen = model(tokens, learn=False, state=model(tokens[:, :0], learn=True).state)
    last = torch.cat([tokens[:, 32:40], tokens[:, 40:]], 1)  # 43 = 16 + 3 * 8 + 3: the last context starts at 32
    last[0] = torch.cat([tokens[0, :1], tokens[0, 33:]])
    close(frozen.logits[:, -3:], model(last).logits[:, -3:], "the last half is what remains")
    bound = sum(box.state_bytes for box in model.levels())
    assert max(whole.state.select([0]).nbytes, state.select([1]).nbytes) <= bound


def test_slow_levels_are_the_early_layers_unless_said_otherwise():
    shape = SHAPE | GROUPED | dict(num_hidden_layers=5)
    make = lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))  # noqa: E731
    convert = partial(convert_to_cms, rates=0.05, calibrate=False)
    periods = lambda m: [level.period for level in m.modules() if hasattr(level, "inner_unit")]  # noqa: E731
    assert periods(convert(make(), (4, 8, math.inf))) == [math.inf, math.inf, 8, 8, 4]
    assert periods(convert(make(), (4, 8), assign=[0, 0, 1, 1, 0])) == [4, 4, 8, 8, 4]
    assert periods(convert(make(), (4,), target_modules=r".*\.[34]\.mlp")) == [4, 4]
    maps = convert(make(), (4,), target_modules=["mlp.down_proj"])
    assert periods(maps) == [4] * 5
    with torch.no_grad():
        assert int(maps(text(1, 9), learn=True).state.writes) == 2


def test_one_rate_is_that_of_all_levels():
    rates = [level.rule.rate for level in continuum_levels(converted(rates=None, calibrate=True)).values()]
    assert rates[0] == rates[1] > 0  # of the mean gradient: per token a slow level writes less
    assert [level.rule.rate for level in continuum_levels(converted(rates=(0.1, 0.2))).values()] == [0.2, 0.1]


@torch.no_grad()
def test_rate_zero_ticks_and_changes_nothing():
    model, tokens = converted(rates=0.0), text(1, 13)
    out = model(tokens, learn=True)
    close(out.logits, model(tokens).logits, "static")
    assert int(out.state.writes) == 3
    close(model.reader(tokens, learn=False).logits, model(tokens).logits, "reader, frozen")


@torch.no_grad()
def test_calibration_remembers_old_text():
    model, tokens = converted(rates=0.05), text(3, 21)
    assert all(m.inner_metric is None for level in continuum_levels(model).values() for m in level.maps.values())
    plainly = model(tokens, learn=True).logits
    model.calibrate(text(4, 30, seed=9))
    for level in continuum_levels(model).values():
        assert float(level.inner_unit) > 0
        for m in level.maps.values():
            assert abs(float(m.inner_keys.diagonal().mean()) - 1) < 1e-5
    assert not torch.allclose(model(tokens, learn=True).logits, plainly, atol=1e-5)


@torch.no_grad()
def test_without_old_text_a_model_shows_itself_what_it_knows():
    model = plain()
    expected = torch.get_rng_state()
    by_itself = convert_to_cms(model, (4, 8), rates=0.05)
    assert torch.equal(torch.get_rng_state(), expected), "the caller's random state was used"
    assert by_itself.config.calibrated and by_itself.training is False
    given = converted(calibrate=True, old_text=own_text(plain(), length=CONTEXT))
    assert by_itself.reader.fingerprint() == given.reader.fingerprint()
    other = converted(calibrate=True, old_text=text(8, 20, seed=4))
    assert by_itself.reader.fingerprint() != other.reader.fingerprint()
    rows = own_text(plain(), 3, 7)
    assert rows.shape == (3, 7) and rows[:, 0].tolist() == [1, 1, 1] and not (rows[:, 1:] == 2).any()


@pytest.mark.parametrize(
    ("family", "shape", "words"),
    [
        ("Mixtral", SHAPE | GROUPED | dict(num_local_experts=2), ["mixtral", "mixture of experts"]),
        ("Bloom", dict(vocab_size=96, hidden_size=16, n_layer=2, n_head=2), ["bloom", "ALiBi"]),
        ("Mamba", dict(vocab_size=96, hidden_size=16, num_hidden_layers=2), ["mamba", "linear_attention"]),
        ("OPT", dict(vocab_size=96, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                     word_embed_proj_dim=16), ["opt", "target_modules"]),
    ],
)  # fmt: skip
def test_families_that_cannot_be_converted_are_refused_by_name(family, shape, words):
    config = getattr(transformers, f"{family}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError) as error:
        convert_to_cms(model, (4, 8))
    assert all(word in str(error.value) for word in words), error.value


def test_a_module_that_mixes_rows_is_refused():
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    with pytest.raises(ValueError, match=r"fc1 sees \(6, 16\), not one row per sequence"):
        convert_to_cms(transformers.OPTForCausalLM(config), (4,), target_modules=["fc1", "fc2"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(periods=(4, 8, 16)), "at most 2"),
        (dict(periods=(8, 4)), "fast to slow"),
        (dict(assign="slow-late"), "unknown"),
        (dict(assign=[0, 2]), "2 indices"),
        (dict(rates=(0.1,)), "1 for 2 periods"),
        (dict(calibrate=False), "give one, e.g."),
        (dict(context=CONTEXT + 1), "2 .. 48"),
        (dict(target_modules=["no_such"]), "matches no module"),
        (dict(target_modules=["input_layernorm"]), "no plain linear map"),
    ],
)
def test_arguments_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        convert_to_cms(plain(), options.pop("periods", (4, 8)), **options)


@torch.no_grad()
def test_states_and_levels_are_those_of_the_library(tmp_path):
    model, tokens = converted(), text(2, 14)
    state = model(tokens, learn=True).state
    nestling.save_state(state, tmp_path / "state")
    back = nestling.load_state(tmp_path / "state")
    for one in (state, back):
        again = model(tokens, state=one, learn=True)
    assert torch.equal(again.logits, model(tokens, state=state, learn=True).logits)
    with pytest.raises(ValueError, match="belongs to model llama-"):
        converted(seed=1)(tokens, state=back)
    boxes = nestling.levels(model)
    assert sum(box.parameters for box in boxes) == sum(p.numel() for p in model.parameters())
    fast = nestling.learn(model, lambda m, ids: m(ids).logits.logsumexp(-1), tokens)
    with fast_weights(model, fast):
        assert not torch.equal(model(tokens).logits, converted()(tokens).logits)


def test_training_through_the_writes():
    model, tokens = converted(), text(2, 17)
    labels = tokens.clone()
    labels[:, 10:] = -100
    with torch.no_grad():
        read = model(tokens, labels=labels, learn=True)
    expected = torch.nn.functional.cross_entropy(read.logits[:, :9].flatten(0, 1), tokens[:, 1:10].flatten())
    torch.testing.assert_close(read.loss, expected)
    out = model(tokens, labels=labels, learn=True)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(x.requires_grad for x in tensors(out.state.tree))


def test_options_that_a_reading_does_not_know():
    with pytest.raises(ValueError, match="inputs_embeds"):
        converted()(text(1, 5), learn=True, inputs_embeds=torch.zeros(1, 5, 16))
