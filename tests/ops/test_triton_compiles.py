"""The kernels compile for a GPU: launched with arguments that they have, in the language that the compiler takes.

Triton's interpreter accepts more than its compiler: arguments that a kernel lacks, constants that change.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed; it is in the extra kernels-test")
ROOT = Path(__file__).parents[2]


def test_kernels_compile_without_a_gpu(tmp_path):
    command = ["benchmarks/kernels.py", "--widths", "16", "--ops", "gated_delta_rule", "titans_mlp", "self_modifying"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    names = ("| gated", "| titans", "| self")
    kernels = [line.split(" | ")[2] for line in ran.stdout.splitlines() if line.startswith(names)]
    assert kernels[:4] == ["_inverse", "_forward", "_backward", "_gradients"]
    assert kernels[4:] == ["_states", "_states_backward", "forward", "backward"]
