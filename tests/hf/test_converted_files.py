"""Converted models as Hugging Face models: files, Auto classes, generate, adapters."""

import json
import math

import pytest
import torch

from tests.hf.needs import need

need("transformers")

import transformers  # noqa: E402

from nestling.hf import ConvertedForCausalLM, convert_to_cms  # noqa: E402
from nestling.memories.continuum import InnerRule  # noqa: E402
from tests.hf.small import GROUPED, SHAPE, cache_of, converted, plain, text  # noqa: E402


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


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_attention_and_output_maps_can_be_levels(tied, tmp_path):
    shape = SHAPE | GROUPED | dict(tie_word_embeddings=tied)
    model, tokens = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval(), text(2, 21)
    before = model(tokens).logits
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp", "lm_head"]
    made = convert_to_cms(model, (8, 16), rates=0.5, target_modules=parts, calibrate=False)
    learned = made(tokens, learn=True)
    assert len(made.config.modules) == 2 * 5 + 1 and torch.equal(made(tokens).logits, before)
    torch.testing.assert_close(learned.logits[:, :8], before[:, :8], rtol=0, atol=2e-6)
    assert not torch.allclose(learned.logits[:, 8:], before[:, 8:], atol=1e-4)
    made.save_pretrained(tmp_path)
    loaded = ConvertedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens, learn=True).logits, learned.logits)
    output, embedding = loaded.pretrained.lm_head.body.weight, loaded.get_input_embeddings().weight
    assert (output is embedding) is tied


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


@pytest.mark.parametrize("learned", [False, True])
def test_the_trainer_resumes_where_a_run_was_cut(learned, tmp_path):
    need("accelerate")
    from nestling.hf.trainer import Trainer

    rows = [{"input_ids": ids, "labels": ids} for ids in text(24, 20)]
    rule = InnerRule(kappa=0, decay=0.1, learned=learned)

    def collate(batch):
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]} | {"learn": True}

    def trainer(seed, **more):
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_steps=2, logging_steps=1, seed=7,
            learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, **more,
        )  # fmt: skip
        model = converted(seed=seed, rule=rule, bptt=2)
        return Trainer(model, options, train_dataset=rows, eval_dataset=rows[:4], data_collator=collate)

    whole = trainer(0)
    whole.train()
    again = trainer(1)  # other weights: all of them must come from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4 and len(again.state.log_history) == len(whole.state.log_history)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    moved = [p for n, p in whole.model.named_parameters() if n.endswith("inner_log_rate")]
    assert len(moved) == 2 * learned and all(abs(p.item() - math.log(0.05)) > 1e-4 for p in moved)
    best = trainer(1, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    best.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = ConvertedForCausalLM.from_pretrained(best.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in best.model.state_dict().items())


def test_learned_rates_and_the_reach_of_training_are_in_the_files(tmp_path):
    rule = InnerRule(kappa=0, learned=True)
    model, tokens = converted(rates=(0.05, 0.0), rule=rule, outer="sequence", bptt=3), text(2, 21)
    rates = {n: p for n, p in model.named_parameters() if n.endswith("inner_log_rate")}
    assert len(rates) == 1  # a level that never writes has no rate to learn
    with torch.no_grad():
        next(iter(rates.values())).add_(0.5)
    model.save_pretrained(tmp_path)
    loaded = ConvertedForCausalLM.from_pretrained(tmp_path)
    assert (loaded.reader.config.outer, loaded.reader.config.bptt) == ("sequence", 3)
    assert loaded.reader.fingerprint() == model.reader.fingerprint()
    ours, theirs = model(tokens, labels=tokens, learn=True).loss, loaded(tokens, labels=tokens, learn=True).loss
    ours.backward()
    theirs.backward()
    assert torch.equal(ours, theirs)
    for (name, p), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, other) and torch.equal(p.grad, other.grad), name
    first = ConvertedForCausalLM.from_pretrained(tmp_path, outer="segment", bptt=0)
    assert (first.reader.config.outer, first.reader.config.bptt) == ("segment", 0)


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
