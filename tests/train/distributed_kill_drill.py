"""Kill one of two ranks with SIGKILL at random moments, start them again until they end, compare with a whole run.

    python -m tests.train.distributed_kill_drill --kills 20

The rank that is left has to end by itself, with a message that says so. Before the first kill one rank gets SIGTERM:
both stop after the same step, with a checkpoint. What is compared: every loss, and the bits of the last weights.
One line per kill; --log FILE writes them as JSON. `torchrun_kill_drill` does it to a job that starts itself again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nestling.train import RunConfig, checkpoints, load_run, read_metrics, run
from nestling.train.checkpoint import step_of
from tests.distributed.programs import fork, wait
from tests.train.small_runs import losses, same, small

SIZE, PATIENCE = 2, 20.0


def config_of() -> RunConfig:
    """Steps, checkpoints and validations enough for a kill to fall into any of them."""
    made = small("hope-attention", rows=4, steps=30, checkpoint_every=3, calibrate_every=0, eval_every=10)
    return replace(
        made, model=replace(made.model, depth=1), parallel=replace(made.parallel, ranks=SIZE, timeout=PATIENCE)
    )


@dataclass(frozen=True)
class Kill:
    """One kill: of which run and rank, how long after its start, and what was there to go on from."""

    run: int
    rank: int
    seconds: float
    step: int  # the last one in metrics.jsonl
    resumed_from: int  # step of the newest whole checkpoint, 0 = none


def moment(folder: Path, run: int, rank: int, seconds: float) -> Kill:
    """What a kill has left, once all ranks have ended."""
    saved = checkpoints(folder / "checkpoints")
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    kill = Kill(run, rank, round(seconds, 3), len(records), step_of(saved[-1]) if saved else 0)
    print(kill, file=sys.stderr, flush=True)
    return kill


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


def drill(kills: int, seed: int, folder: Path) -> tuple[list[Kill], int]:
    """All kills, and how often the rank that was left said why it ended."""
    moments, config = random.Random(seed), config_of()
    began = time.monotonic()
    assert wait(Attempt(config, folder / "whole").ranks) == [0] * SIZE, (folder / "log.txt").read_text()
    duration, done, runs, explained = time.monotonic() - began, list[Kill](), 0, 0
    while len(done) < kills:
        runs += 1
        target = folder / f"killed-{runs}"
        if runs == 1:
            stop_cleanly(config, target, 0.6 * duration)
        codes = [-signal.SIGKILL]
        while codes != [0] * SIZE:
            attempt = Attempt(config, target)
            if len(done) < kills:
                seconds, rank = moments.uniform(0, duration), moments.randrange(SIZE)
                codes = attempt.signalled(seconds, rank, signal.SIGKILL)
                done += [moment(target, runs, rank, seconds)] if -signal.SIGKILL in codes else []
                explained += "lost another rank, " in attempt.said
            else:
                codes = wait(attempt.ranks)
                assert codes == [0] * SIZE, attempt.said
        compare(folder / "whole", target)
    return done, explained


def compare(one: Path, other: Path) -> None:
    """Raise AssertionError if a loss or a bit of the weights differs."""
    assert losses(one) == losses(other)
    quiet = {"say": lambda line: None}
    assert same(load_run(one, **quiet)[0].state_dict(), load_run(other, **quiet)[0].state_dict())


def report(what: str, kills: list[Kill], whole: Path, log: Path | None) -> None:
    """One line about all kills, every run of which has ended as `whole` has; the log if it is wanted."""
    said = f"{what}: {len(kills)} kills in {kills[-1].run} runs, every loss and weight equal bit for bit"
    if log is not None:
        final = read_metrics(whole / "metrics.jsonl")[-1]["loss"]
        log.write_text(json.dumps({"said": said, "final_loss": final.hex(), "kills": [asdict(kill) for kill in kills]}))
    print(said)


def arguments(about: str) -> argparse.Namespace:
    """Of a drill."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="write every kill here, as JSON")
    return parser.parse_args()


def main() -> None:
    chosen = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        kills, explained = drill(chosen.kills, chosen.seed, Path(folder))
        said = f"{SIZE} ranks, {explained} times the one left said why it ended"
        report(said, kills, Path(folder) / "whole", chosen.log)


if __name__ == "__main__":
    sys.exit(main())
