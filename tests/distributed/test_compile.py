"""Two processes with compiled blocks, recomputed activations and FSDP2 train as one without any of these does."""

from pathlib import Path

from tests.distributed.programs import printed


def test_two_processes_with_compiled_blocks_equal_one_without(tmp_path: Path) -> None:
    """A Hope-Attention whose levels write and whose rows hold borders of documents, in float64."""
    found = printed("compiled_runs", tmp_path)
    assert found["apart"]["writes"] == 0 and max(found["apart"].values()) <= 1e-10
    for rank in found["graphs"]:
        assert rank["graphs"] > 0 and not rank["breaks"]
