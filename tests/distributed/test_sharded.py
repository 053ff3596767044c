"""Two processes with FSDP2 equal one: both train on half of each batch, gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestling.optim.sharded import chunks

SCRIPT = Path(__file__).with_name("processes.py")
ELEMENT_WISE = ("AdamW", "Momentum", "Preconditioned, diagonal", "DeltaMomentum, scalar", "MultiLevel")
MATRICES = ("Muon", "M3", "DGD", "DGD, first order", "DGD, other layers")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process printed. They meet in a file: a port may be taken."""
    file = tmp_path_factory.mktemp("processes") / "store"
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT)]
    ran = [
        subprocess.Popen(
            [*command, rank, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate(timeout=120) for process in ran]
    assert [process.returncode for process in ran] == [0, 0], "\n".join(out + err for out, err in printed)
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


@pytest.mark.parametrize(
    ("name", "allowed"), [(name, 1e-6) for name in ELEMENT_WISE] + [(name, 1e-5) for name in MATRICES]
)
def test_two_processes_equal_one_over_ten_steps(results: list[dict], name: str, allowed: float) -> None:
    for process in results:
        assert process[name]["difference"] <= allowed
        assert process[name]["moved"] > 1e-2


def test_each_matrix_is_orthogonalised_by_one_process_and_alone(results: list[dict]) -> None:
    assert [process["factored"] for process in results] == [[[1, 8, 8], [1, 8, 7]], [[1, 7, 8]]]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 5, 7, 8])
def test_chunks_are_those_of_torch(rows: int, size: int) -> None:
    there = [len(part) for part in torch.arange(rows).chunk(size)]
    assert chunks(rows, size) == there + [0] * (size - len(there))


def test_dgd_refuses_processes_whose_inputs_it_does_not_see(results: list[dict]) -> None:
    assert all("2 processes train" in process["refusal"] for process in results)


def test_a_sharded_checkpoint_goes_on_with_equal_bits(results: list[dict]) -> None:
    assert all(process["resumed"] for process in results)
