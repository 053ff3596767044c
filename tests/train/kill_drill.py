"""Kill training with SIGKILL at random moments, resume until it ends, and compare with a run that was never killed.

    python -m tests.train.kill_drill --kills 20 --model hope

Each attempt is a forked process, so the moments fall into reading, writing of metrics, checkpoints and their removal.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from nestling.train import RunConfig, run
from tests.train.small_runs import MODELS, assert_same_run, small


def attempt(config: RunConfig, folder: Path, kill_after: float | None) -> bool:
    """Run or resume in a new process; kill it after some seconds. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        code = 1
        try:
            _, result = run(config, folder, resume=True)
            code = 0 if result.finished else 2
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # a child that has ended waits as a zombie, so this always has a target
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit(f"a run failed:\n{(folder.parent / 'log.txt').read_text()}")
    return False


def drill(model: str, kills: int, seed: int, folder: Path) -> int:
    """Kill `kills` times; returns the number of runs that this took. Raises AssertionError if a run differs."""
    moments = random.Random(seed)
    config = small(model, steps=40, checkpoint_every=3, calibrate_every=9)
    began = time.monotonic()
    attempt(config, folder / "whole", None)
    duration, done, runs = time.monotonic() - began, 0, 0
    while done < kills:
        killed, runs = True, runs + 1
        while killed:
            killed = attempt(config, folder / f"killed-{runs}", moments.uniform(0, duration) if done < kills else None)
            done += killed
        assert_same_run(folder / "whole", folder / f"killed-{runs}")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", choices=MODELS, default="hope-attention")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = drill(chosen.model, chosen.kills, chosen.seed, Path(folder))
    print(f"{chosen.model}: {chosen.kills} kills in {runs} runs, every loss, weight and state equal bit for bit")


if __name__ == "__main__":
    sys.exit(main())
