"""kill -9 of one rank at random moments: the others end, and the resumed run is the uninterrupted one.

Resumed by hand, and by torchrun itself.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("drill", "kills"), [("distributed_kill_drill", 3), ("torchrun_kill_drill", 1)])
def test_kills(drill: str, kills: int) -> None:
    command = [sys.executable, "-m", f"tests.train.{drill}", "--kills", str(kills)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills in " in done.stdout
