"""Converted models as Hugging Face models: files, Auto classes, generate, adapters."""

import json

import pytest
import torch

from tests.hf.needs import need

need("transformers")

import transformers  # noqa: E402

from nestling.hf import ConvertedForCausalLM  # noqa: E402
from tests.hf.small import cache_of, converted, plain, text  # noqa: E402


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@torch.no_grad()
def test_files_bring_the_same_bits_back(family, tmp_path):
    model, tokens = converted(family), text(2, 13)
    if family == "Llama":
        model.calibrate(text(2, 20, seed=5))
    model.save_pretrained(tmp_path)
    for loaded in (
        ConvertedForCausalLM.from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is ConvertedForCausalLM
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert torch.equal(loaded(tokens, learn=True).logits, model(tokens, learn=True).logits)
        assert loaded.reader.fingerprint() == model.reader.fingerprint()
        assert list(loaded.levels()) == list(model.levels())


def test_the_plain_class_refuses_the_files(tmp_path):
    converted().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nestling_converted"
    with pytest.raises(OSError, match="no file named"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_generate_is_that_of_the_plain_model(how):
    tokens = text(2, 5)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, **how)
    assert torch.equal(converted().generate(tokens, **options), plain().generate(tokens, **options))


def test_a_cache_with_only_the_new_ids_is_refused():
    model, tokens = converted(), text(1, 6)
    cache = cache_of(model.pretrained, model(tokens, use_cache=True))
    with pytest.raises(ValueError, match=r"nestling\.Session"):
        model.generate(text(1, 2), **cache, max_new_tokens=2)
    whole = torch.cat([tokens, text(1, 2)], 1)
    assert model.generate(whole, **cache, max_new_tokens=2, pad_token_id=0).shape == (1, 10)


def test_what_the_reader_generates_goes_on_from_a_state():
    model, tokens = converted(), text(1, 12)
    with torch.no_grad():
        state = model(tokens[:, :9], learn=True).state
        whole = model.reader.generate(tokens, 4, temperature=0, learn_prompt=False).all()
    made = model.reader.generate(tokens[:, 9:], 4, state=state.reset_context(), temperature=0)
    assert made.all().shape == (1, 4) and made.state.tokens.tolist() == [16]
    assert torch.equal(whole, model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, 12:])
    with pytest.raises(ValueError, match=r"nestling\.Session"):
        model.generate(tokens, state=state)


def test_the_trainer_trains_through_the_writes(tmp_path):
    need("accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in text(2, 12).repeat(4, 1)]

    def collate(batch):
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]} | {"learn": True}

    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, learning_rate=3e-2,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(converted(), options, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "out")
    assert (tmp_path / "out" / "model.nestling.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_adapters_go_on_top():
    need("peft")
    import peft

    model, tokens = converted(), text(2, 11)
    start = model(tokens, learn=True).logits
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(input_ids=tokens, learn=True).logits, start, rtol=0, atol=2e-6)
    adapted(input_ids=tokens, labels=tokens, learn=True).loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 8 and all(g is not None for g in grads.values())
    assert all(float(g.norm()) > 0 for n, g in grads.items() if "lora_B" in n)
    assert adapted.generate(input_ids=tokens[:, :4], max_new_tokens=2, pad_token_id=0).shape == (2, 6)
