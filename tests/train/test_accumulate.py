"""A step whose rows are read in parts, or whose activations are computed again, is the same step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.train import DataConfig, RunConfig, prepare
from nestling.train.trainer import Trainer
from tests.train.small_runs import small

STEPS = 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(config: RunConfig, data: Path, **parallel) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The records of some steps, and the weights after them."""
    config = replace(config, parallel=replace(config.parallel, **parallel))
    ready = prepare(config, data=data)
    trainer = Trainer(ready.model, ready.stream, config)
    return [trainer.next_step() for _ in range(STEPS)], ready.model.state_dict()


@pytest.mark.parametrize(
    ("name", "matrices", "parallel"),
    [
        ("hope", "adamw", {"accumulate": 4}),
        ("hope-attention", "adamw", {"recompute": True}),
        ("hope", "dgd", {"accumulate": 2, "recompute": True}),
    ],
)
def test_the_step_is_the_same(tmp_path: Path, name: str, matrices: str, parallel: dict) -> None:
    """Rows end their documents at different places, and segments end where steps do: row by row nothing mixes."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(f"{i} times {i} is {i * i}. " * (4 + i % 5))
    config = small(name, rows=4, calibrate_every=0, steps=STEPS)
    config = replace(config, data=DataConfig(text="texts", validation="moby_dick"))
    config = replace(config, optim=replace(config.optim, matrices=matrices))
    (records, weights), (others, same) = trained(config, tmp_path), trained(config, tmp_path, **parallel)
    for one, other in zip(records, others, strict=True):
        assert one["writes"] == other["writes"] and sum(one["writes"]) > 0
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-10)
    for key, weight in weights.items():
        torch.testing.assert_close(same[key], weight, rtol=1e-9, atol=1e-12)
