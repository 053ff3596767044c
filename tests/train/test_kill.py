"""kill -9 at random moments: the resumed run is the uninterrupted one, bit for bit."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_three_kills():
    command = [sys.executable, "-m", "tests.train.kill_drill", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hope-attention: 3 kills in ")
