"""Two and four processes train as one does, and what they save is read by any number of them.

A small Hope with levels that write, ten steps, some of whose rows hold borders of documents; float64 throughout,
Newton-Schulz in float32.
"""

import pytest

from tests.distributed.programs import printed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What train_runs.py printed."""
    return printed("train_runs", tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("name", "allowed"), [("adamw", 1e-10), ("muon", 1e-5), ("m3", 1e-5), ("dgd", 1e-10), ("sequence", 1e-10)]
)
def test_processes_equal_one(found: dict, name: str, allowed: float) -> None:
    """AdamW on four with hybrid sharding, Muon on two that read their rows in two parts and recompute, M3 on four
    with hybrid sharding, DGD on two that read their rows in two parts; AdamW on two times two that read a stretch of
    their rows each."""
    apart = found[name]
    assert apart["weights"] <= allowed and apart["loss"] <= allowed and apart["held_out"] <= allowed
    assert apart["writes"] == 0


def test_two_ranks_go_on_under_dgd_with_equal_bits(found: dict) -> None:
    """What it meets is forgotten after each step, so a checkpoint needs nothing of it."""
    assert found["dgd"]["resumed"] == 0


def test_a_checkpoint_of_two_ranks_is_read_by_one_and_four_with_equal_bits(found: dict) -> None:
    """Weights, optimizer, and fast weights, clocks and buffers of every row; the steps meanwhile do not reach it."""
    assert not found["background"]["differs"]
    assert found["background"]["weights"] <= 1e-10


def test_a_checkpoint_of_one_process_is_read_by_two_and_four_with_equal_bits_and_goes_on(found: dict) -> None:
    """So a run can begin on a laptop: after the load every bit is the same, and so is the end of the run."""
    assert not found["from one"]["differs"]
    for size in (2, 4):
        apart = found["from one"][f"on {size}"]
        assert apart["weights"] <= 1e-10 and apart["loss"] <= 1e-10 and apart["held_out"] <= 1e-10
        assert apart["writes"] == 0


def test_a_checkpoint_that_is_cut_short_is_noticed(found: dict) -> None:
    assert "__1_0.distcp has 100 of " in found["background"]["damaged"]
