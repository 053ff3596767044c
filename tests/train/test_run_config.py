"""Configs: impossible values cannot be built, files are read strictly, differences are named."""

import json
import math
import re
from dataclasses import fields, is_dataclass, replace

import pytest

from nestling.train import (
    DataConfig,
    GuardConfig,
    ModelChoice,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    config_from_json,
    config_to_json,
    difference,
    from_dict,
    read_config,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), r"train.steps=0 is below 1; use at least 1"),
        (lambda: TrainConfig(eval_every=-1), r"train.eval_every=-1 is negative"),
        (lambda: TrainConfig(length=100, stream_length=250), r"stream_length=250 is not a multiple .* use 200"),
        (lambda: OptimConfig(lr=0), r"optim.lr=0 is not positive"),
        (lambda: OptimConfig(lr=math.nan), r"optim.lr=nan is not positive"),
        (lambda: OptimConfig(final_lr=2), r"optim.final_lr=2 is not in \[0, 1\]"),
        (lambda: OptimConfig(beta2=1.0), r"optim.beta2=1.0 is not in \[0, 1\)"),
        (lambda: OptimConfig(clip_norm=0), r"use inf for no clipping"),
        (lambda: OptimConfig(weight_decay=-1), r"optim.weight_decay=-1 is negative"),
        (lambda: OptimConfig(eps=0), r"optim.eps=0"),
        (lambda: OptimConfig(warmup_steps=-1), r"optim.warmup_steps=-1"),
        (lambda: DataConfig(text=""), r"data.text is empty"),
        (lambda: DataConfig(validation_fraction=1), r"data.validation_fraction=1 is not between"),
        (lambda: ModelChoice(dim=0), r"model.dim=0 is below 1"),
        (lambda: ModelChoice(options={"dim": 3}), r"model.options\['dim'\] has a field of its own; set model.dim"),
        (lambda: RunConfig(train=TrainConfig(steps=5)), r"warmup_steps=20 is more than train.steps=5; use at most 5"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        RunConfig().train.steps = 3
    with pytest.raises(TypeError):
        OptimConfig(1e-3)


def changed() -> RunConfig:
    model = ModelChoice(periods=(16.0, math.inf), inner_lr=(0.1,), options={"inner_kappa": 3.0, "inner_online": True})
    return RunConfig(model=model, optim=OptimConfig(clip_norm=math.inf), train=TrainConfig(seed=7))


def test_json_round_trip_is_standard_json():
    for config in (RunConfig(), changed()):
        text = config_to_json(config)
        json.loads(text, parse_constant=pytest.fail)
        assert config_from_json(text) == config


def test_reading_is_strict(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'train.step'; did you mean 'train.steps'\?"):
        config_from_json('{"train": {"step": 3}}')
    with pytest.raises(ValueError, match="unknown key 'zzz'; known are model, data, optim, train"):
        config_from_json('{"zzz": 1}')
    with pytest.raises(ValueError, match="train.steps='many' is not int"):
        config_from_json('{"train": {"steps": "many"}}')
    with pytest.raises(ValueError, match="optim.lr=True is not float"):
        config_from_json('{"optim": {"lr": true}}')
    with pytest.raises(ValueError, match="train is 3, not a mapping"):
        config_from_json('{"train": 3}')
    with pytest.raises(ValueError, match="not a config"):
        config_from_json("{")
    with pytest.raises(FileNotFoundError, match="no config file"):
        read_config(tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"optim": {"lr": 1}}')
    assert read_config(tmp_path / "run.json").optim.lr == 1.0
    (tmp_path / "run.json").write_text('{"optim": {"lr": -1}}')
    with pytest.raises(ValueError, match=r"run.json: optim.lr=-1.0 is not positive"):
        read_config(tmp_path / "run.json")


def test_difference_names_every_leaf():
    a = RunConfig()
    b = replace(a, train=replace(a.train, steps=400), model=replace(a.model, periods=(8.0, math.inf)))
    lines = difference(a.to_dict(), b.to_dict())
    assert lines == ["model.periods: None -> (8.0, inf)", "train.steps: 300 -> 400"]
    assert difference(json.loads(config_to_json(b)), b.to_dict()) == []


def test_overrides_leave_out_what_the_preset_decides():
    assert ModelChoice().overrides() == {}
    assert changed().model.overrides() == {
        "periods": (16.0, math.inf),
        "inner_lr": 0.1,
        "inner_kappa": 3.0,
        "inner_online": True,
    }
    assert ModelChoice(match="transformer").overrides() == {"match": "transformer"}
    assert ModelChoice(match="500000", inner_lr=(0.1, 0.2)).overrides() == {"match": 500000, "inner_lr": (0.1, 0.2)}


def test_every_field_has_a_line_of_meaning():
    import inspect

    import nestling.train.config as module

    source = inspect.getsource(module)
    for cls in (ModelChoice, DataConfig, OptimConfig, TrainConfig, ParallelConfig, GuardConfig):
        assert is_dataclass(cls)
        for field in fields(cls):
            after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
            assert after.startswith('    """') and after.endswith('."""'), f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("parallel", {"accumulate": 0}, "parallel.accumulate=0 is below 1"),
        (
            "parallel",
            {"ranks": 3},
            "train.rows=8 do not divide into 3 ranks times parallel.accumulate=1; use a multiple",
        ),
        ("parallel", {"timeout": 0}, "parallel.timeout=0.0 is not positive"),
        ("guard", {"spike": 1}, "guard.spike=1.0 is not above 1"),
        ("guard", {"rollbacks": 2}, "guard.rollbacks=2 without guard.skips"),
        ("optim", {"matrices": "sgd"}, "optim.matrices='sgd' is unknown; use one of adamw, muon, m3, dgd"),
        ("optim", {"matrices_lr": -1}, "optim.matrices_lr=-1.0 is negative; use 0"),
        ("optim", {"matrices_lr": 1}, "optim.matrices_lr=1.0 with optim.matrices=adamw; set optim.lr"),
        ("optim", {"erase": -1}, "optim.erase=-1.0 is negative; use 0 to forget nothing"),
        ("parallel", {"tensor": 0}, "parallel.tensor=0 is below 1"),
        ("optim", {"ns_dtype": "half"}, "optim.ns_dtype='half' is unknown"),
    ],
)
def test_impossible_ways_to_spread_guard_and_write(section, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(RunConfig, {section: values})


def test_dgd_in_compiled_blocks_is_refused():
    with pytest.raises(ValueError, match="train.compile with optim.matrices=dgd, .*; leave out one of the two"):
        from_dict(RunConfig, {"optim": {"matrices": "dgd"}, "train": {"compile": True}})
