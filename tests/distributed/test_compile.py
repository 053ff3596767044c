"""Two processes with compiled blocks, recomputed activations and FSDP2 train as one without any of these does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_processes_with_compiled_blocks_equal_one_without(tmp_path: Path) -> None:
    """A Hope-Attention whose levels write and whose rows hold borders of documents, in float64."""
    command = [sys.executable, "-m", "tests.distributed.compiled_runs", str(tmp_path)]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr + (tmp_path / "log.txt").read_text()
    found = json.loads(ran.stdout)
    assert found["apart"]["writes"] == 0 and max(found["apart"].values()) <= 1e-10
    for rank in found["graphs"]:
        assert rank["graphs"] > 0 and not rank["breaks"]
