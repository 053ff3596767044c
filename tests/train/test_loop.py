"""Training runs: they learn, write, stop, resume bit for bit, and refuse what would lose something."""

import errno
import json
import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

import nestling.train.checkpoint
import nestling.train.metrics
from nestling.data import Batch, ByteTokenizer, TokenStream, bundled_text, tokenize
from nestling.train import DataConfig, OptimConfig, load_run, prepare, read_metrics, resume, run, train
from nestling.train.checkpoint import checkpoints
from nestling.train.loop import Trainer
from tests.train.small_runs import MODELS, assert_same_run, losses, small, with_train


@pytest.fixture(autouse=True)
def without_progress(capsys):
    """Progress lines stay out of the report."""


def signal_at(step: int, name: signal.Signals):
    """A validation that sends this process a signal at its `step`-th call."""
    calls = []

    def score(model):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), name)
        return {"loss": 0.0}

    return score


def test_training_lowers_the_loss_on_the_bundled_text(tmp_path):
    config = small(steps=60, rows=8, length=64, stream_length=640, eval_every=20, eval_windows=16)
    config = replace(config, data=DataConfig(text="shakespeare"), optim=OptimConfig(lr=1e-2, warmup_steps=5))
    run(config, tmp_path / "run")
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    held_out = [r["validation"]["loss"] for r in records if "validation" in r]
    assert len(held_out) == 3 and held_out[0] > held_out[1] > held_out[2]
    shares = torch.tensor(list(Counter(bundled_text("shakespeare")).values())).double() / 1_003_854
    unigram = float(-(shares * shares.log()).sum())
    assert held_out[-1] < 0.95 * unigram < math.log(256) < records[0]["loss"]


@pytest.mark.parametrize("name", ["hope-attention", "hope"])
def test_every_level_writes_and_says_so(tmp_path, name):
    run(small(name), tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    # 12 steps x 24 tokens in streams of 120: floor((n - 1) / period) writes per row and stream of n tokens
    expected = [2 * sum((n - 1) // period for n in (120, 120, 48)) for period in (16, 32)]
    assert [sum(r["writes"][level] for r in records) for level in range(2)] == expected
    assert len(records[-1]["write_norms"]) == 4 and all(v > 0 for v in records[-1]["write_norms"].values())
    assert [r["tokens"] for r in records] == [48 * step for step in range(1, 13)]
    assert all(r["tokens_per_second"] > 0 and r["peak_memory"] > 0 for r in records)


def test_context_is_carried_only_when_asked(tmp_path):
    """From the second step of a stream on, keys and values of the steps before change the loss."""
    a, b = (
        run(small(carry_context=c, steps=7), tmp_path / str(c)) and losses(tmp_path / str(c)) for c in (False, True)
    )
    assert a[0] == b[0] and a[3] != b[3]


def test_state_is_cleared_at_the_end_of_a_stream(tmp_path):
    config = small(steps=6)
    ready = prepare(config)
    ages, loss = [], ready.model.loss

    def watched(tokens, targets, *, state, new_document):
        ages.append(0 if state is None else int(state.tokens[0]))
        return loss(tokens, targets, state=state, new_document=new_document)

    ready.model.loss = watched
    train(ready.model, ready.stream, config, tmp_path / "run")
    assert ages == [0, 24, 48, 72, 96, 0]


@pytest.mark.parametrize("name", MODELS)
def test_resumed_equals_uninterrupted(tmp_path, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(small(name), whole, evaluate=lambda model: {"loss": 0.0})
    said = []
    _, first = run(small(name), cut, evaluate=signal_at(1, signal.SIGTERM), say=said.append)
    assert first.step == 6 and first.stopped_by == "SIGTERM" and not first.finished
    assert said == [
        f"stopped by SIGTERM after step 6 of 12; saved up to step 6; go on with: nestling train --resume {cut}"
    ]
    _, last = run(small(name), cut, evaluate=lambda model: {"loss": 0.0}, resume=True, say=pytest.fail)
    assert last.finished and last.step == 12 and last.stopped_by == ""
    assert_same_run(whole, cut)


def test_interrupt_right_before_the_end_and_at_a_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    config = small(eval_every=4)
    for at, step in ((1, 4), (1, 8)):
        _, result = run(config, tmp_path, evaluate=signal_at(at, signal.SIGINT), resume=step > 4, say=lambda s: None)
        assert result.step == step and result.stopped_by == "SIGINT"
    _, result = run(config, tmp_path, evaluate=signal_at(1, signal.SIGINT), resume=True, say=pytest.fail)
    assert result.finished and len(read_metrics(tmp_path / "metrics.jsonl")) == 12
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_is_immediate_and_loses_nothing_saved(tmp_path):
    def twice(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(small(), tmp_path, evaluate=twice)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]
    run(small(), tmp_path, resume=True)
    assert len(losses(tmp_path)) == 36


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_full_disk_stops_with_the_way_to_resume_and_loses_nothing(tmp_path, monkeypatch, where):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(small(), whole)
    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) > (13 if where == "checkpoint" else 6):
            if where == "metrics":
                arguments[0].file.write('{"step": 7, "lo')
                arguments[0].file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    target = (
        (nestling.train.checkpoint, "write_file")
        if where == "checkpoint"
        else (
            nestling.train.metrics.MetricsFile,
            "append",
        )
    )
    real = getattr(*target)
    monkeypatch.setattr(*target, full)
    step = 8 if where == "checkpoint" else 7
    message = f"stopped in step {step}: .*No space left.*; saved up to step 4; go on with: nestling train --resume"
    with pytest.raises(OSError, match=message):
        run(small(), cut)
    monkeypatch.undo()
    assert resume(cut)[1].finished
    assert_same_run(whole, cut)


def test_a_damaged_checkpoint_is_never_loaded(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(small(), whole)
    run(small(), cut)
    for file in ("manifest.json", "state.safetensors"):
        newest = checkpoints(cut / "checkpoints")[-1] / file
        newest.write_bytes(newest.read_bytes()[:-5])
        said = []
        assert resume(cut, say=said.append)[1].finished
        assert len(said) == 1 and "step-00000012" in said[0] and "kept as step-00000012.aside-" in said[0]
        assert_same_run(whole, cut)


def test_changed_config_or_data_is_refused_with_the_difference(tmp_path):
    run(small(), tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"config.train.length: 24 -> 20; config.train.steps: 12 -> 13; resume with"):
        run(with_train(small(), steps=13, length=20), tmp_path, resume=True)
    text = tmp_path.parent / f"{tmp_path.name}.txt"
    text.write_text(bundled_text("moby_dick"))
    other = replace(small(), data=DataConfig(text=str(text)))
    with pytest.raises(ValueError, match="config.data.text: 'moby_dick' -> "):
        run(other, tmp_path, resume=True)
    run(other, tmp_path / "other")
    text.write_text(bundled_text("moby_dick") + "one more line")
    with pytest.raises(ValueError, match=r"data.count: .*data.tokens: "):
        run(other, tmp_path / "other", resume=True)
    assert all(p.read_bytes() == content for p, content in files.items())


def test_harmless_settings_may_change(tmp_path):
    run(small(), tmp_path, evaluate=signal_at(1, signal.SIGINT), say=lambda s: None)
    assert run(with_train(small(), checkpoint_every=3), tmp_path, resume=True)[1].finished


def test_other_versions_are_mentioned(tmp_path):
    run(small(), tmp_path)
    settings = json.loads((tmp_path / "run.json").read_text())
    settings["versions"]["threads"] = 64
    (tmp_path / "run.json").write_text(json.dumps(settings))
    said = []
    resume(tmp_path, say=said.append)
    assert said == [f"resumed, but not bit for bit as before: threads: 64 -> {torch.get_num_threads()}"]


def test_a_used_folder_is_refused_without_resume(tmp_path):
    run(small(), tmp_path / "run")
    with pytest.raises(FileExistsError, match="is not empty; go on with it"):
        run(small(), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for again in (False, True):
        with pytest.raises((FileExistsError, ValueError), match="choose another folder"):
            run(small(), tmp_path / "mine", resume=again)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    with pytest.raises(FileNotFoundError, match=r"no run.json in"):
        resume(tmp_path / "mine")


def test_a_folder_in_use_is_refused(tmp_path):
    def intrude(model):
        with pytest.raises(BlockingIOError, match="in use by another process"):
            run(small(), tmp_path, resume=True)
        return {"refused": 1.0}

    run(small(eval_every=0), tmp_path, evaluate=intrude)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["validation"] == {"refused": 1.0}


def test_checkpoints_from_outside_need_trust(tmp_path):
    run(small(), tmp_path / "theirs")
    theirs = checkpoints(tmp_path / "theirs/checkpoints")[0]
    with pytest.raises(ValueError, match="lies outside the run folder .* --trust"):
        run(small(), tmp_path / "mine", checkpoint=theirs)
    assert run(small(), tmp_path / "mine", checkpoint=theirs, resume=True, trust=True)[1].finished
    assert [r["step"] for r in read_metrics(tmp_path / "mine/metrics.jsonl")] == [9, 10, 11, 12]
    with pytest.raises(ValueError, match="config.train.seed: 0 -> 1"):
        run(small(seed=1), tmp_path / "seeded", checkpoint=theirs, trust=True)
    shutil.rmtree(tmp_path / "mine/checkpoints")
    (tmp_path / "mine/checkpoints").symlink_to(tmp_path / "theirs/checkpoints")
    with pytest.raises(ValueError, match="lies outside the run folder"):
        resume(tmp_path / "mine")


def test_an_older_checkpoint_of_the_run_can_be_chosen(tmp_path):
    run(small(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    older = checkpoints(tmp_path / "again/checkpoints")[0]
    said = []
    run(small(), tmp_path / "again", checkpoint=older, resume=True, say=said.append)
    assert len(said) == 1 and "step-00000012 is newer than" in said[0]
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    config = small()
    ready = prepare(config)
    loss = ready.model.loss

    def breaks(tokens, targets, *, state, new_document):
        value, after = loss(tokens, targets, state=state, new_document=new_document)
        return value * (float("nan") if len(seen) > 5 else 1.0), seen.append(1) or after

    seen: list[int] = []
    ready.model.loss = breaks
    with pytest.raises(FloatingPointError, match="step 7 has loss nan .* smaller optim.lr.*saved up to step 4"):
        train(ready.model, ready.stream, config, tmp_path)
    assert all(torch.isfinite(p).all() for p in ready.model.parameters())
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 7))


def test_load_run_gives_the_trained_model(tmp_path):
    trained, _ = run(small(), tmp_path)
    model, tokenizer = load_run(tmp_path)
    assert tokenizer.fingerprint == "bytes"
    for (name, a), b in zip(trained.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_run(tmp_path)


def test_calibration_reads_the_training_text(tmp_path):
    ready, _ = run(small(calibrate_every=0), tmp_path)
    keys = [b for name, b in ready.model.named_buffers() if name.endswith("inner_keys") and b.numel()]
    assert keys and all(torch.isfinite(k).all() and k.diagonal().mean() == pytest.approx(1.0, rel=1e-4) for k in keys)


def test_bf16_trains_with_float32_weights_and_states(tmp_path):
    ready, _ = run(small(bf16=True, steps=4), tmp_path)
    full = losses(tmp_path)
    run(small(steps=4), tmp_path / "float32")
    assert full != losses(tmp_path / "float32") and full[0] == pytest.approx(losses(tmp_path / "float32")[0], rel=0.02)
    assert {p.dtype for p in ready.model.parameters()} == {torch.float32}


def test_devices_that_are_not_here_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="train.device='gpu' is no device of torch; use cpu or cuda"):
        run(small(device="gpu"), tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"train.device='cuda:1' is not here \(1 CUDA devices found\); use cpu"):
        run(small(device="cuda:1"), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="cuda has no bfloat16"):
        run(small(device="cuda", bf16=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_level_that_hardly_writes_is_mentioned(tmp_path):
    said = []
    run(small(steps=4, stream_length=48), tmp_path, say=said.append)
    assert len(said) == 2 and all("period 32" in line and "train.stream_length=128 or more" in line for line in said)


def test_weights_of_another_architecture_are_refused(tmp_path):
    run(small(), tmp_path)
    other = prepare(small("transformer"))
    with pytest.raises(ValueError, match="weights do not fit the model") as caught:
        train(other.model, other.stream, small(), tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_shards_train_too(tmp_path):
    from nestling.data import write_shards

    write_shards([bundled_text("moby_dick")[:20_000]], ByteTokenizer(), tmp_path / "shards", shard_tokens=7_000)
    config = replace(small(steps=4), data=DataConfig(text=str(tmp_path / "shards")))
    with pytest.raises(ValueError, match="name a second one as data.validation"):
        run(config, tmp_path / "run")
    config = replace(config, data=DataConfig(text="shards", validation="emma"))
    assert run(config, tmp_path / "run", data=tmp_path)[1].finished
    tokens = tokenize([bundled_text("moby_dick")[:20_000]], ByteTokenizer())
    same_text = prepare(small(steps=4))
    train(same_text.model, TokenStream(tokens, rows=2, length=24), small(steps=4), tmp_path / "text")
    assert [r["loss"] for r in read_metrics(tmp_path / "run/metrics.jsonl")] == [
        r["loss"] for r in read_metrics(tmp_path / "text/metrics.jsonl")
    ]


def test_a_document_starts_with_an_empty_context(tmp_path):
    ready = prepare(small(steps=3))
    seen: list[bool] = []
    loss = ready.model.loss

    def watched(tokens, targets, *, state, new_document):
        seen.append(new_document is not None)
        return loss(tokens, targets, state=state, new_document=new_document)

    starts = torch.zeros(2, 33, dtype=torch.bool)
    starts[1, 5] = True
    ready.model.loss = watched
    batch = Batch(tokens=torch.randint(256, (2, 33)), new_document=starts)
    trainer = Trainer(ready.model, ready.stream, small(steps=3))
    value, _ = trainer.backward(batch, None)
    plain, _ = trainer.backward(Batch(tokens=batch.tokens, new_document=torch.zeros_like(starts)), None)
    assert seen == [True, False] and value != plain
