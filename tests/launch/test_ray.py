"""Ray as a launcher: what needs no Ray, and, where it is installed, two workers, a killed one, and a sweep.

pip install 'nestling[ray]' && python -m pytest tests/launch
"""

import json
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nestling.cli.main import main
from nestling.cli.parser import UsageError
from nestling.cli.ray import grid
from nestling.launch.ray import saved_step, sweep_on_ray, train_on_ray, trials
from nestling.train import RunConfig, run
from tests.train.small_runs import losses, small

STEPS = 60


def config_of(**train: object) -> RunConfig:
    made = small("hope-attention", steps=STEPS, checkpoint_every=5, calibrate_every=0, eval_every=30, **train)
    return replace(made, model=replace(made.model, depth=1))


def test_trials_are_every_combination():
    made = trials(config_of(), {"optim.lr": [1e-3, 2e-3], "train.seed": [0, 1], "model.name": ["hope", "transformer"]})
    assert len(made) == 8
    one = made["lr=0.002,seed=1,name=transformer"]
    assert (one.optim.lr, one.train.seed, one.model.name, one.train.steps) == (2e-3, 1, "transformer", STEPS)
    with pytest.raises(ValueError, match="unknown key 'optim.rate'"):
        trials(config_of(), {"optim.rate": [1.0]})


def test_a_grid_is_read_by_the_types_of_the_fields():
    found = grid(["optim.lr=1e-3,2e-3", "train.seed=0,1", "optim.clip_norm=inf", "model.name=hope"])
    assert found == {
        "optim.lr": [1e-3, 2e-3], "train.seed": [0, 1], "optim.clip_norm": [math.inf], "model.name": ["hope"],
    }  # fmt: skip
    with pytest.raises(UsageError, match="did you mean --optim.lr"):
        grid(["optim.lrr=1"])
    with pytest.raises(UsageError, match="is not FIELD=A,B"):
        grid(["seeds"])


def test_errors_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = "recipes/lm_small.py:hope"
    assert main(["ray", recipe, "--out", str(tmp_path / "new")]) == 1
    assert "pip install 'nestling[ray]'" in capsys.readouterr().err
    assert main(["ray", recipe, "--workers", "3", "--out", str(tmp_path / "new")]) == 1
    assert "train.rows=8 do not divide into 3 ranks" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert main(["ray", recipe, "--out", str(tmp_path / "used")]) == 1
    assert "is not empty; go on with it (resume)" in capsys.readouterr().err
    assert main(["ray", recipe, "--workers", "2", "--sweep", "train.seed=0,1"]) == 2
    assert "--workers cannot be combined with --sweep" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine, whose workers find this checkout."""
    ray = pytest.importorskip("ray", reason="ray is not installed; runs with: pip install 'nestling[ray]'")
    root = str(Path(__file__).parents[2])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(config_of(), folder, say=lambda line: None)
    return losses(folder)


@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_two_workers_equal_one_process(cluster, alone, tmp_path):
    assert train_on_ray(config_of(), tmp_path / "two", workers=2, restarts=0) == STEPS
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-4)
    versions = json.loads((tmp_path / "two" / "run.json").read_text())["versions"]
    assert versions["ranks"] == 2


@pytest.mark.filterwarnings("default")
def test_a_killed_worker_is_started_again_and_the_run_goes_on(cluster, alone, tmp_path):
    psutil, killed = pytest.importorskip("psutil"), []

    def kill_one() -> None:
        while saved_step(tmp_path / "run") < 10:
            time.sleep(0.01)
        below = psutil.Process().children(recursive=True)
        workers = [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]
        killed.append((len(workers), saved_step(tmp_path / "run")))
        workers[-1].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert train_on_ray(config_of(), tmp_path / "run", workers=2, restarts=2) == STEPS
    killer.join(1)
    assert killed and killed[0][0] == 2 and 10 <= killed[0][1] < STEPS
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-4)


@pytest.mark.filterwarnings("default")
def test_a_sweep_skips_what_is_finished(cluster, tmp_path):
    config = config_of()
    runs = trials(config, {"optim.lr": [1e-3, 4e-3], "train.seed": [0, 1]})
    first, *others = runs
    run(runs[first], tmp_path / first, say=lambda line: None)
    before = (tmp_path / first / "metrics.jsonl").read_bytes()
    table = sweep_on_ray(runs, tmp_path)
    assert {name for name, row in table.items() if row["skipped"]} == {first}
    assert all(row["step"] == STEPS and not row["fault"] for row in table.values())
    assert (tmp_path / first / "metrics.jsonl").read_bytes() == before
    run(runs[others[-1]], tmp_path / "by hand", say=lambda line: None)
    assert losses(tmp_path / others[-1]) == losses(tmp_path / "by hand")
    again = sweep_on_ray(runs, tmp_path)
    assert all(row["skipped"] for row in again.values())
    assert json.loads((tmp_path / "table.json").read_text()) == again


@pytest.mark.filterwarnings("default")
def test_a_bad_trial_is_named_and_the_others_go_on(cluster, tmp_path):
    config = config_of()
    bad = replace(config, data=replace(config.data, text="no such text"))
    table = sweep_on_ray({"bad": bad, "good": config}, tmp_path, restarts=0)
    assert "no such text" in table["bad"]["fault"] and table["bad"]["step"] == 0
    assert table["good"]["step"] == STEPS and not table["good"]["fault"]
