"""Runs small enough for tests: a few milliseconds per step, writes and stream borders inside."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nestling.train import (
    DataConfig,
    ModelChoice,
    OptimConfig,
    RunConfig,
    TrainConfig,
    checkpoints,
    read_checkpoint,
    read_metrics,
)

MODELS = ("transformer", "hope-attention", "hope")


def small(name: str = "hope-attention", **train: Any) -> RunConfig:
    """12 steps of 2 rows of 24 tokens; a checkpoint every 4 steps, streams of 5 steps, periods that no step divides."""
    periods = None if name == "transformer" else (16.0, 32.0)
    settings = {"steps": 12, "rows": 2, "length": 24, "stream_length": 120, "eval_windows": 2, "eval_every": 6}
    settings |= {"checkpoint_every": 4, "calibrate_every": 5}
    return RunConfig(
        model=ModelChoice(name=name, dim=16, depth=2, heads=2, chunk_size=8, periods=periods),
        data=DataConfig(text="moby_dick"),
        optim=OptimConfig(warmup_steps=3),
        train=TrainConfig(**(settings | train)),
    )


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    """The same config with other training settings."""
    return replace(config, train=replace(config.train, **changes))


def losses(folder: Path) -> list[float]:
    """Loss and validation loss of every step, after a check that each step stands there once, in order."""
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [value for r in records for value in (r["loss"], r["grad_norm"], r.get("validation", {}).get("loss", 0.0))]


def same(a: Any, b: Any) -> bool:
    """Equal bits of two trees of dicts, lists, states and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else a == b


def assert_same_run(one: Path, other: Path) -> None:
    """Equal losses at every step, and equal bits in all that the last checkpoints hold, the time apart."""
    assert losses(one) == losses(other)
    a, b = (checkpoints(folder / "checkpoints")[-1] for folder in (one, other))
    assert a.name == b.name
    a, b = read_checkpoint(a), read_checkpoint(b)
    for parts in (a, b):
        parts["progress"].pop("seconds")
    for name in a:
        assert same(a[name], b[name]), f"part {name} differs"
