"""kill -9 of one rank at random moments: the others end, and the resumed run is the uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_three_kills():
    command = [sys.executable, "-m", "tests.train.distributed_kill_drill", "--kills", "3"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "3 kills in " in done.stdout
