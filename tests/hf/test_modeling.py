"""NestlingForCausalLM: the models of this library under transformers' generate, files, and Trainer."""

import math

import pytest
import torch

from tests.hf.needs import need

need("transformers")

import transformers  # noqa: E402

from nestling.hf import NestlingCache, NestlingConfig, NestlingForCausalLM  # noqa: E402
from nestling.hf.cache import CACHE  # noqa: E402
from nestling.models import build  # noqa: E402

MODELS = {"hope": dict(chunk_size=4), "hope-attention": dict(window=None)}
VOCABULARY, PAD = 32, 0
GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=PAD)


def wrapped(name="hope", seed=0, **options):
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCABULARY, dim=16, depth=2, heads=2, periods=(4, 8, math.inf), inner_lr=0.05)
    return NestlingForCausalLM.of(build(name, **shape | MODELS[name] | options)).eval()


def text(rows, length, seed=1):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generate_with_the_state_is_generate_without(name, how):
    model, tokens = wrapped(name), text(2, 7)
    made = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        made.append(model.generate(tokens, use_cache=use_cache, **GREEDY | how))
    assert torch.equal(*made) and made[0].shape == (2, 13)


def test_generate_is_the_reader_s_own():
    model, tokens = wrapped(), text(2, 7)
    own = model.reader.generate(tokens, 6, temperature=0, learn_prompt=False).all()
    assert torch.equal(model.generate(tokens, **GREEDY)[:, 7:], own)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_is_nowhere(name):
    model, tokens = wrapped(name), text(2, 9)
    mask = torch.ones_like(tokens)
    tokens[0, :4], mask[0, :4] = PAD, 0
    for learn in (False, True):
        with torch.no_grad():
            together = model(tokens, attention_mask=mask, learn=learn)
            alone = model(tokens[:1, 4:], learn=learn)
        torch.testing.assert_close(together.logits[:1, 4:], alone.logits, rtol=0, atol=2e-6)
        assert together.state.tokens.tolist() == [5, 9]
        assert together.state.writes.tolist() == ([[1, 0], [2, 1]] if learn else [[0, 0], [0, 0]])
        made = model.generate(tokens, attention_mask=mask, learn=learn, **GREEDY)
        assert torch.equal(made[:1, 9:], model.generate(tokens[:1, 4:], learn=learn, **GREEDY)[:, 5:])


def test_a_cache_with_only_the_new_ids_is_refused():
    model, tokens = wrapped(), text(1, 6)
    out = model(tokens, use_cache=True)
    assert isinstance(out[CACHE], NestlingCache) and out[CACHE].get_seq_length() == 6
    with pytest.raises(ValueError, match=r"seen 6 tokens, but only 2 ids .* nestling\.Session"):
        model.generate(text(1, 2), **{CACHE: out[CACHE]}, **GREEDY)
    whole = torch.cat([tokens, text(1, 2)], 1)
    assert torch.equal(model.generate(whole, **{CACHE: out[CACHE]}, **GREEDY), model.generate(whole, **GREEDY))
    with pytest.raises(ValueError, match="cropped"):
        out[CACHE].crop(-1)
    with pytest.raises(ValueError, match="a cache and a state"):
        model(text(1, 2), state=out.state, **{CACHE: out[CACHE]})
    with pytest.raises(ValueError, match="DynamicCache"):
        model(text(1, 2), **{CACHE: transformers.DynamicCache()})
    out[CACHE].reset()
    assert out[CACHE].get_seq_length() == 0 and out[CACHE].state is None


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_files_bring_the_same_bits_back(tmp_path, learned):
    model, tokens = wrapped(inner_learned=learned), text(2, 13)
    model.save_pretrained(tmp_path)
    assert "| blocks.0: cms 4 | token | 4 |" in (tmp_path / "README.md").read_text()
    for loaded in (
        NestlingForCausalLM.from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is NestlingForCausalLM and loaded.config.vocab_size == VOCABULARY
        assert loaded.reader.config == model.reader.config
        assert loaded.reader.fingerprint() == model.reader.fingerprint()
        assert torch.equal(loaded(tokens, learn=True).logits, model(tokens, learn=True).logits)


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = wrapped()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_config_is_written_in_the_fields_of_a_model():
    config = NestlingConfig(name="hope-attention", vocab_size=32, dim=16, depth=1, heads=2, periods=(4, math.inf))
    model = NestlingForCausalLM(config)
    assert model.reader.config.periods == (4, math.inf) and config.hidden_size == 16
    again = NestlingConfig.from_dict(config.to_dict())
    assert again.model_config() == model.reader.config == NestlingConfig.of(model.reader.config).model_config()


def test_a_wrong_config_is_refused():
    with pytest.raises(ValueError, match="unknown key"):
        NestlingForCausalLM(NestlingConfig(model={"name": "hope", "breadth": 3}))


@pytest.mark.parametrize("learn", [False, True])
def test_the_trainer_trains_and_resumes(tmp_path, learn):
    need("accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in text(2, 12).repeat(8, 1)]

    def collate(batch):
        together = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
        return together | {"learn": learn}

    def trainer(steps):
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, save_steps=2, logging_steps=1,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        return transformers.Trainer(wrapped(), options, train_dataset=rows, eval_dataset=rows, data_collator=collate)

    whole = trainer(4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    again = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert math.isfinite(again.evaluate()["eval_loss"])
