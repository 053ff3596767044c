"""Kill one of two ranks with SIGKILL at random moments, start them again until they end, compare with a whole run.

    python -m tests.train.distributed_kill_drill --kills 20

The rank that is left has to end by itself, with a message that says so. Before the first kill one rank gets SIGTERM:
both stop after the same step, with a checkpoint. What is compared: every loss, and the bits of the last weights.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from nestling.train import RunConfig, load_run, run
from tests.distributed.train_runs import fork, wait
from tests.train.small_runs import losses, same, small

SIZE, PATIENCE = 2, 20.0


def config_of() -> RunConfig:
    """Steps, checkpoints and validations enough for a kill to fall into any of them."""
    made = small("hope-attention", rows=4, steps=30, checkpoint_every=3, calibrate_every=0, eval_every=10)
    return replace(
        made, model=replace(made.model, depth=1), parallel=replace(made.parallel, ranks=SIZE, timeout=PATIENCE)
    )


class Attempt:
    """Both ranks of a run, started or resumed; what they say goes to a log."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.log = folder.parent / "log.txt"
        self.began = self.log.stat().st_size if self.log.exists() else 0

        def work(rank: int) -> None:
            torch.set_num_threads(1)
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            _, result = run(config, folder, resume=True)
            assert result.finished, f"stopped by {result.stopped_by} after step {result.step}"

        self.ranks = fork(SIZE, folder.parent, work, patience=PATIENCE)

    def signalled(self, seconds: float, rank: int, number: int) -> list[int]:
        """Send a signal after some seconds; the exit codes."""
        time.sleep(seconds)
        os.kill(self.ranks[rank], number)  # a child that has ended waits as a zombie: there is always a target
        return wait(self.ranks)

    @property
    def said(self) -> str:
        return self.log.read_text()[self.began :]


def stop_cleanly(config: RunConfig, folder: Path, seconds: float) -> None:
    """SIGTERM to one rank ends both after the same step."""
    attempt = Attempt(config, folder)
    attempt.signalled(seconds, 1, signal.SIGTERM)
    said = attempt.said
    stopped = [
        line.split("after step ")[1] for line in said.splitlines() if "AssertionError: stopped by SIGTERM" in line
    ]
    if stopped:  # otherwise it came before the handler was there, or after the last step
        assert len(stopped) == SIZE and len(set(stopped)) == 1, said
        assert f"saved up to step {stopped[0]}" in said, said


def drill(kills: int, seed: int, folder: Path) -> tuple[int, int]:
    """Returns the number of runs that the kills took, and how often the rank that was left said why it ended."""
    moments, config = random.Random(seed), config_of()
    began = time.monotonic()
    assert wait(Attempt(config, folder / "whole").ranks) == [0] * SIZE, (folder / "log.txt").read_text()
    duration, done, runs, explained = time.monotonic() - began, 0, 0, 0
    while done < kills:
        runs += 1
        target = folder / f"killed-{runs}"
        if runs == 1:
            stop_cleanly(config, target, 0.6 * duration)
        codes = [-signal.SIGKILL]
        while codes != [0] * SIZE:
            attempt = Attempt(config, target)
            if done < kills:
                codes = attempt.signalled(moments.uniform(0, duration), moments.randrange(SIZE), signal.SIGKILL)
                done += -signal.SIGKILL in codes
                explained += "lost another rank, " in attempt.said
            else:
                codes = wait(attempt.ranks)
                assert codes == [0] * SIZE, attempt.said
        compare(folder / "whole", target)
    return runs, explained


def compare(one: Path, other: Path) -> None:
    """Raise AssertionError if a loss or a bit of the weights differs."""
    assert losses(one) == losses(other)
    quiet = {"say": lambda line: None}
    assert same(load_run(one, **quiet)[0].state_dict(), load_run(other, **quiet)[0].state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs, explained = drill(chosen.kills, chosen.seed, Path(folder))
    print(f"{SIZE} ranks: {chosen.kills} kills in {runs} runs, every loss and weight equal bit for bit; ", end="")
    print(f"the rank left said why it ended {explained} times")


if __name__ == "__main__":
    sys.exit(main())
