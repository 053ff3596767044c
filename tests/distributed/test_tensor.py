"""Ranks that split the matrices train as one process, hold half of them, and write the checkpoints of any run.

Small runs of six steps (M3: ten) with borders of documents in the rows. In float32 a sum over hidden units, heads or
words in two parts rounds differently from one sum, by 1e-7 of its largest term; AdamW passes that on at most times
the rate. So losses and weights are compared to 1e-6 of their size there, and to 1e-10 in float64, where 1e-15 was
found. Muon and M3 orthogonalise in float32, of a matrix whose rows lie in another order: 1e-5, as without split
matrices.
"""

import pytest

from tests.distributed.programs import printed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What tensor_runs.py printed."""
    return printed("tensor_runs", tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("transformer", 1e-6), ("levels", 1e-6), ("two dimensions", 1e-10), ("muon", 1e-5), ("m3", 1e-5)],
)
def test_split_ranks_equal_one_process(found: dict, name: str, allowed: float) -> None:
    """Transformer++ in two parts of its rows, Hope-Attention with recomputed blocks, both on two ranks in float32;
    Hope-Attention on two times two and Hope with Muon on two, and Hope-Attention with M3 on two stretches of two."""
    apart = found[name]
    assert apart["weights"] <= allowed
    assert apart["loss"] <= 6 * allowed and apart["held_out"] <= 6 * allowed  # of losses of 5 to 6 nats
    assert apart["writes"] == 0


@pytest.mark.parametrize("reader", ["one", "four", "two copies"])
def test_a_checkpoint_of_two_times_two_is_read_by_any_ranks_with_equal_bits(found: dict, reader: str) -> None:
    """By one process, by four ranks that split nothing, by two copies of two: weights, moments, fast weights, buffers,
    caches; and they end where a run of one process ends."""
    assert found["resumed"]["middle"] <= 1e-10
    assert not found["resumed"][reader]["differs"]
    assert found["resumed"][reader]["end"] <= 1e-10


def test_a_checkpoint_of_one_process_is_read_by_ranks_that_split(found: dict) -> None:
    there = found["resumed"]["of one, split"]
    assert not there["differs"] and there["end"] <= 1e-10


def test_a_checkpoint_of_stretches_is_read_by_one_process_with_its_state(found: dict) -> None:
    """Four ranks of which two share rows by stretches, and two split matrices; M3."""
    assert found["resumed"]["stretches"]["end"] <= 1e-5


def test_a_rank_holds_half_of_what_is_split(found: dict) -> None:
    """Between steps and inside of one, and half of their moments; and half of what its levels wrote."""
    for rank in found["resumed"]["bytes"]:
        assert len(rank["split"]) == 2 + 2 + 2 * 2  # embedding and head, q k v and output, two levels
        for name, (whole, *here) in rank["sizes"].items():
            assert here == 3 * [whole // 2 if name in rank["split"] else whole], name
        split, rest = rank["fast"]
        assert 2 * split == found["resumed"]["fast"] > 10 * rest > 0
