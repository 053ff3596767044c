"""DGD writes the hidden matrices of a training run: what it meets, at which rate, and over a resumption."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.optim import DGD, MultiLevel
from nestling.train import OptimConfig, RunConfig, prepare, run
from nestling.train.optimizer import make_optimizer, set_rate
from nestling.train.trainer import Trainer
from tests.train.small_runs import assert_same_run, small
from tests.train.test_loop import signal_at


def with_dgd(**train) -> RunConfig:
    made = small("hope", **train)
    return replace(made, optim=replace(made.optim, matrices="dgd", erase=0.5))


def dgd_of(optimizer: torch.optim.Optimizer) -> DGD:
    assert isinstance(optimizer, MultiLevel)
    made = optimizer.optimizers["hidden matrices"]
    assert isinstance(made, DGD)
    return made


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_meets_every_token_of_a_step_once(accumulate: int) -> None:
    """Levels that learn, segments that are read again for them, calibration and validation meet nothing."""
    config = with_dgd(calibrate_every=1, carry_context=True)
    config = replace(config, parallel=replace(config.parallel, accumulate=accumulate))
    ready = prepare(config)
    trainer = Trainer(ready.model, ready.stream, config)
    dgd, met = dgd_of(trainer.optimizer), []
    write = dgd.step

    def step() -> None:
        met.append({keys.count for keys in dgd.keys.values()})
        write()

    dgd.step = step  # type: ignore[method-assign]
    for _ in range(4):
        assert sum(trainer.next_step()["writes"]) >= 0
    assert met == [{config.train.rows * config.train.length}] * 4


def test_it_writes_hidden_matrices_at_their_own_rate_and_adamw_the_rest() -> None:
    model, config = prepare(with_dgd()).model, OptimConfig(matrices="dgd", lr=0.01, weight_decay=0.2)
    optimizer = make_optimizer(model, config)
    written = {id(p) for group in dgd_of(optimizer).param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in written}
    assert "blocks.0.mixer.project_z.weight" in names and "blocks.1.channel.stack.1.body.down.weight" in names
    assert not any("embedding" in name or "head" in name or "norm" in name for name in names)
    set_rate(optimizer, 0.005, config)
    rates = {group["level"]: (group["lr"], group["lr"] * group["weight_decay"]) for group in optimizer.param_groups[:2]}
    assert rates["hidden matrices"] == pytest.approx((0.15, 0.005 * 0.2))
    assert rates["the rest"] == pytest.approx((0.005, 0.005 * 0.2))


def test_a_resumed_run_has_equal_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(with_dgd(), whole, evaluate=lambda model: {"loss": 0.0})
    _, first = run(with_dgd(), cut, evaluate=signal_at(1, signal.SIGTERM), say=lambda line: None)
    assert first.step == 6 and not first.finished
    run(with_dgd(), cut, evaluate=lambda model: {"loss": 0.0}, resume=True)
    assert_same_run(whole, cut)
