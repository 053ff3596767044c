"""Kill a rank of a live `torchrun --max-restarts 3` with SIGKILL at random moments: the job goes on by itself.

    python -m tests.train.torchrun_kill_drill --kills 20

Nobody starts anything again: torchrun notices, ends the other rank, starts both, and they go on from the newest whole
checkpoint. Every job has up to three kills and must end well. Compared with a job without any kill: every loss, and
the bits of the last weights. One line per kill; --log FILE writes them as JSON.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nestling.train import config_to_json
from tests.train.distributed_kill_drill import SIZE, Kill, arguments, compare, config_of, moment, report
from tests.train.small_runs import with_train

ROOT = Path(__file__).parents[2]
RESTARTS, PATIENCE = 3, 300.0


class Job:
    """A run on two ranks, under torchrun."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
        torchrun += ["--max-restarts", str(RESTARTS), "--monitor-interval", "0.1"]
        train = ["nestling", "train", "--config", str(config), "--out", str(folder)]
        with open(self.log, "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *torchrun, "-m", *train],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
            )

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that are there."""
        number = self.process.pid
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        return [child for child in map(int, children) if "nestling" in command_of(child)]

    def started(self, before: list[int]) -> list[int]:
        """The ranks, once all of them are there and none of `before`; empty if the job has ended."""
        until = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            found = self.ranks()
            if len(found) == SIZE and not set(found) & set(before):
                return found
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)
        return []

    def end(self) -> None:
        """Wait until all is done, well."""
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()


def command_of(number: int) -> str:
    """The command line of a process; empty once it has ended, also while nobody has waited for it."""
    try:
        return Path(f"/proc/{number}/cmdline").read_text()
    except OSError:
        return ""


def killed(job: Job, run: int, wanted: int, moments: random.Random, duration: float) -> list[Kill]:
    """Up to `wanted` kills of one job, each at a random moment after the ranks have started."""
    done, ranks = list[Kill](), list[int]()
    while len(done) < wanted and (ranks := job.started(ranks)):
        seconds, rank = moments.uniform(0, duration), moments.randrange(SIZE)
        time.sleep(seconds)
        if not command_of(ranks[rank]):
            break
        os.kill(ranks[rank], signal.SIGKILL)
        while any(command_of(number) for number in ranks):
            time.sleep(0.02)
        done.append(moment(job.folder, run, rank, seconds))
    return done


def drill(kills: int, seed: int, folder: Path) -> list[Kill]:
    """All kills."""
    moments, config, done, run = random.Random(seed), folder / "config.json", list[Kill](), 0
    config.write_text(config_to_json(with_train(config_of(), steps=120, eval_every=40)))
    began = time.monotonic()
    whole = Job(config, folder / "whole")
    whole.started([])
    first = time.monotonic()
    whole.end()
    duration = time.monotonic() - first
    print(f"a job without a kill: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    while len(done) < kills:
        run += 1
        job = Job(config, folder / f"killed-{run}")
        made = killed(job, run, min(RESTARTS, kills - len(done)), moments, duration)
        job.end()
        compare(folder / "whole", job.folder)
        done += made
    return done


def main() -> None:
    chosen = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        kills = drill(chosen.kills, chosen.seed, Path(folder))
        report(f"torchrun --max-restarts {RESTARTS}, {SIZE} ranks", kills, Path(folder) / "whole", chosen.log)


if __name__ == "__main__":
    main()
