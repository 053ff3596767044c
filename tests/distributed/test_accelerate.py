"""Accelerate, two processes on the CPU: as the launcher of `nestling train`, and in a loop of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestling.train import read_metrics
from tests.hf.needs import need

need("accelerate")
need("transformers")
ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]
SMALL = "--train.steps 3 --optim.warmup_steps 1 --optim.decay_steps 3 --train.length 64 --train.stream_length 256"
SMALL += " --train.eval_every 0 --train.eval_windows 2 --model.depth 1"


def python(*arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def train(folder: Path, *launch: str) -> subprocess.CompletedProcess:
    words = ["-m", "nestling", "train", "recipes/lm_small.py:hope", *SMALL.split(), "--out", str(folder)]
    return python(*launch, *words)


def test_the_same_command_under_accelerate_equals_one_process(tmp_path):
    two = train(tmp_path / "two", *LAUNCH, "--multi_gpu", "--num_processes", "2")
    assert two.returncode == 0, two.stderr
    one = train(tmp_path / "one")
    assert one.returncode == 0, one.stderr
    left, right = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["versions"]["ranks"] == 2
    assert [r["loss"] for r in left] == pytest.approx([r["loss"] for r in right], rel=1e-5)


def test_fewer_processes_than_asked_for_are_noticed(tmp_path):
    """`--cpu --num_processes 2` of accelerate 1.15 starts one process, and does not say so."""
    ran = python(
        *LAUNCH, "--cpu", "--num_processes", "2", "-m", "nestling", "train", "recipes/lm_small.py:hope",
        "--parallel.ranks", "2", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert ran.returncode != 0
    assert "parallel.ranks=2, but 1 processes are running; start them with: torchrun" in ran.stderr


def test_a_loop_of_ones_own_equals_one_process():
    script = "tests/distributed/accelerate_loop.py"
    two = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    one = python(script)
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    left, right = (json.loads(ran.stdout.splitlines()[-1]) for ran in (two, one))
    assert (left["processes"], right["processes"]) == (2, 1)
    assert left["losses"] == pytest.approx(right["losses"], rel=1e-5)
    assert right["losses"][-1] < right["losses"][0] - 0.1
