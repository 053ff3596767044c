"""Bad steps are left out; when they repeat the run goes back, reads on behind the bad text, and at last stops."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.train import GuardConfig, RunConfig, TrainResult, prepare, read_metrics, train
from nestling.train.guard import LEAST, Guard
from tests.train.small_runs import small


@pytest.fixture(autouse=True)
def without_progress(capsys):
    """Progress lines stay out of the report."""


def guarded(**guard) -> RunConfig:
    return replace(small(calibrate_every=0, eval_every=0), guard=GuardConfig(**guard))


def run_with_bad_text(config: RunConfig, folder: Path, bad: range, said: list[str]) -> tuple[TrainResult, int]:
    """Train where the loss is not finite for the batches `bad`; the result, and the tokens read per row."""
    ready = prepare(config)
    loss, length = ready.model.loss, config.train.length

    def poisoned(*arguments, **options):
        value, state = loss(*arguments, **options)
        return (value * math.nan if ready.stream.position // length in bad else value), state

    ready.model.loss = poisoned
    result = train(ready.model, ready.stream, config, folder, say=said.append)
    assert all(p.isfinite().all() for p in ready.model.parameters())
    return result, ready.stream.position


def test_what_is_bad() -> None:
    guard = Guard(GuardConfig(skips=1, rollbacks=1, spike=5))
    assert guard.judge(1.0, 100.0) and all(guard.judge(1.0, 1.0 + 0.01 * i) for i in range(LEAST))
    assert not guard.judge(math.nan, 1.0) and guard.fault == "loss nan and gradient norm 1.0" and not guard.exhausted
    assert not guard.judge(1.0, 6.0) and guard.fault.endswith("6 times the usual one") and guard.exhausted
    assert not guard.gives_up
    other = Guard(guard.config)
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    guard.went_back(guard.rollbacks)
    assert (
        guard.judge(1.0, 4.0) and not guard.judge(1.0, math.inf) and not guard.judge(math.nan, 1.0) and guard.gives_up
    )


def test_a_single_bad_step_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    result, read = run_with_bad_text(guarded(skips=1), tmp_path, range(6, 7), said)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert result.finished and [r["step"] for r in records if r.get("skipped")] == [6] and read == 12 * 24
    assert records[5]["loss"] is None and records[6]["loss"] is not None
    assert said == ["step 6 left out: loss nan and gradient norm nan"]


def test_bad_steps_in_a_row_lead_back_and_the_run_reads_on_behind_them(tmp_path: Path) -> None:
    said: list[str] = []
    result, read = run_with_bad_text(guarded(skips=1, rollbacks=1), tmp_path, range(6, 8), said)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert result.finished and [r["step"] for r in records] == list(range(1, 13))
    assert not any("skipped" in r for r in records) and read == (7 + 8) * 24
    assert said[-1].endswith("in step 7 and before: back to step 4, reading on behind that text")


@pytest.mark.parametrize(("guard", "returns"), [({"skips": 1}, 0), ({"skips": 1, "rollbacks": 2}, 2)])
def test_a_run_that_stays_bad_stops(tmp_path: Path, guard: dict, returns: int) -> None:
    with pytest.raises(
        FloatingPointError, match=f"2 bad steps in a row .* after {returns} returns .*saved up to step 4"
    ):
        run_with_bad_text(guarded(**guard), tmp_path, range(6, 1000), [])


def test_spikes_wait_until_the_usual_norm_is_known() -> None:
    guard = Guard(GuardConfig(skips=1, spike=2))
    assert guard.judge(1.0, 1.0) and guard.judge(1.0, 1e6) and guard.judge(float(torch.ones(())), 1.0)
