"""The Trainer of transformers, two processes on the CPU: as one process with the same batches."""

import json

import pytest
import torch

from tests.distributed.test_accelerate import python
from tests.hf.needs import need

need("accelerate")
need("transformers")

from nestling.hf import NestlingForCausalLM  # noqa: E402
from tests.distributed import hf_trainer  # noqa: E402


def test_two_processes_equal_one_and_save_what_they_learned(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = python(*launch, "tests/distributed/hf_trainer.py", str(two))
    assert ran.returncode == 0, ran.stderr
    hf_trainer.train(one)
    found, expected = (json.loads((folder / "losses.json").read_text()) for folder in (two, one))
    assert (found["processes"], expected["processes"]) == (2, 1) and len(expected["losses"]) == 4
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    left, right, alone = (torch.load(f) for f in (two / "rank 0.pt", two / "rank 1.pt", one / "rank 0.pt"))
    saved, names = NestlingForCausalLM.from_pretrained(two).state_dict(), hf_trainer.fresh().state_dict()
    assert left.keys() == right.keys() == alone.keys() == saved.keys() == names.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]) and torch.equal(weight, saved[name]), name
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert any(not torch.allclose(weight, names[name], atol=1e-3) for name, weight in left.items())
