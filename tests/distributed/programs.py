"""Programs of this folder: a test starts one in a process of its own, which trains, forks ranks, and prints JSON.

The ranks are forked from a process that has loaded everything, and meet in a file: a port may be taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before the fork: FSDP2 imports it, two seconds for every rank
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp

from nestling.train import RunConfig, read_metrics, run
from nestling.train.run import load_run

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 10, 4  # of the small runs
PATIENCE = 280.0  # seconds that a test waits for a program


def printed(name: str, folder: Path) -> Any:
    """What the program `name` of this folder prints; AssertionError with what it said if it fails."""
    command = [sys.executable, "-m", f"tests.distributed.{name}", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr + (folder / "log.txt").read_text()
    return json.loads(ran.stdout)


def begun(dtype: torch.dtype = torch.float64) -> Path:
    """The folder of this program, with texts in it and a log of what the ranks say; one thread, numbers of `dtype`."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    write_texts(folder)
    os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT), 2)
    return folder


def write_texts(folder: Path) -> None:
    """Documents shorter than a step, so that ranks cut their rows at different places."""
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i:02d}.txt").write_text(f"{i} times {i} is {i * i}. " * (4 + i % 5))


def fork(size: int, folder: Path, work: Callable[[int], None], patience: float = 300.0) -> list[int]:
    """`work(rank)` in `size` processes that form a group; their numbers. At the end they wait for each other."""
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            store = dist.FileStore(str(meeting), size)
            store.set_timeout(timedelta(seconds=patience))
            limit = timedelta(seconds=patience)
            dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=limit)
            work(rank)
            store.set(f"done {rank}", "")
            store.wait([f"done {other}" for other in range(size)])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # gloo's threads sometimes abort a process that shuts it down (torch 2.13)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def together(size: int, folder: Path, work: Callable[[int], None]) -> None:
    codes = wait(fork(size, folder, work))
    assert codes == [0] * size, codes


def quiet_run(config: RunConfig, folder: Path, data: Path, **options: Any) -> None:
    run(config, folder, data=data, say=lambda line: None, **options)


def saved(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def difference(one: Path, other: Path, steps: int = STEPS) -> dict[str, float]:
    """How far the last weights, the losses and the counts of writes of two runs are apart."""
    a, b = (load_run(path)[0].state_dict() for path in (one, other))
    weights = max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-3)) for n in b)
    left, right = (read_metrics(path / "metrics.jsonl") for path in (one, other))
    assert len(left) == len(right) == steps
    loss = max(abs(x["loss"] - y["loss"]) for x, y in zip(left, right, strict=True))
    held_out = max(
        abs(x["validation"]["loss"] - y["validation"]["loss"])
        for x, y in zip(left, right, strict=True)
        if "validation" in x
    )
    writes = [[r["writes"] for r in records] for records in (left, right)]
    return {"weights": weights, "loss": loss, "held_out": held_out, "writes": float(writes[0] != writes[1])}
