"""Two GPUs with nccl train as one does: `python -m pytest tests/gpu` where there are two. Not run yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestling.train import read_metrics

ROOT, DEVICE = Path(__file__).parents[2], "cuda"
OPTIONS = "--train.steps 10 --optim.warmup_steps 2 --optim.decay_steps 10 --train.length 64 --train.stream_length 1024"
OPTIONS += " --train.eval_every 0 --train.eval_windows 8 --optim.ns_dtype float32 --model.periods 64 128"
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 CUDA devices, {torch.cuda.device_count()} are here"
)


def losses(folder: Path, processes: int, matrices: str) -> list[float]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["-m", "nestling", "train", "recipes/lm_small.py:hope", *OPTIONS.split(), "--optim.matrices", matrices]
    words += ["--train.device", DEVICE, "--parallel.ranks", str(processes), "--out", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *launch, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250
    )
    assert ran.returncode == 0, ran.stderr
    records = read_metrics(folder / "metrics.jsonl")
    assert sum(records[-1]["writes"]) > 0
    return [record["loss"] for record in records] + [records[-1]["validation"]["loss"]]


@needs_two
@pytest.mark.gpu
@pytest.mark.parametrize(("matrices", "allowed"), [("adamw", 1e-4), ("muon", 1e-3), ("m3", 1e-3)])
def test_two_gpus_equal_one(tmp_path, matrices, allowed):
    two, one = (losses(tmp_path / str(size), size, matrices) for size in (2, 1))
    assert two == pytest.approx(one, rel=allowed)
    assert one[-1] < one[0]
