"""Ranks that gather a block for each of its passes train as one process does, and hold less.

A small Hope with levels that write, and a Transformer; rows hold borders of documents, at other places on every rank;
float64.
"""

from dataclasses import replace

import pytest

from nestling.bench.plan import GPUS, plan
from nestling.models import config_of
from nestling.train import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from nestling.train.parallel.reshard import check_reshard
from tests.distributed.programs import printed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What reshard_runs.py printed."""
    return printed("reshard_runs", tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", ["hope", "hybrid", "outer", "transformer"])
def test_processes_equal_one(found: dict, name: str) -> None:
    """Two that read their rows in two parts and recompute, four with hybrid sharding, two whose gradient goes through
    all segments, two of a Transformer."""
    apart = found[name]
    assert apart["weights"] <= 1e-10 and apart["loss"] <= 1e-10 and apart["held_out"] <= 1e-10
    assert apart["writes"] == 0


def test_a_run_goes_on_from_a_checkpoint_with_equal_bits_and_on_one_process(found: dict) -> None:
    assert found["resumed"]["same"] == {"weights": 0, "loss": 0, "held_out": 0, "writes": 0}
    apart = found["resumed"]["one"]
    assert apart["weights"] <= 1e-10 and apart["loss"] <= 1e-10 and apart["writes"] == 0


def test_only_the_block_that_runs_is_whole(found: dict) -> None:
    """In every forward and every backward pass of three blocks; between steps no weight is."""
    for rank in found["passes"]:
        assert rank["spread"]
        assert {what for what, _, _ in rank["passes"]} == {"forward", "backward"}
        assert {index for _, index, _ in rank["passes"]} == {0, 1, 2}
        assert all(whole == [index] for _, index, whole in rank["passes"])


def test_ranks_make_the_same_passes_though_their_segments_end_at_different_places(found: dict) -> None:
    """Each rank also joins in where only the other one has a segment to read again."""
    one, other = found["passes"]
    assert [entry[:2] for entry in one["passes"]] == [entry[:2] for entry in other["passes"]]
    for rank in (one, other):
        assert rank["counts"]["_keep_company"] > 0
        assert rank["counts"]["_read_again"] > rank["counts"]["_keep_company"]  # it calls the other


def test_a_step_holds_what_is_planned(found: dict) -> None:
    """Beyond what lies there between steps, by the allocator's record; few tokens, so that weights are most of it. The
    plan is up to a fifth above what is held."""
    for rank in found["plans"]:
        whole, freed = rank["transformer, whole"]["bytes"], rank["transformer, reshard"]["bytes"]
        for made in (whole, freed):
            assert 0.8 * made["planned"] < made["counted"] < 1.02 * made["planned"]
        assert whole["counted"] - freed["counted"] > 1.5 * whole["weights"]


@pytest.mark.parametrize("name", ["transformer", "hope"])
def test_a_step_exchanges_what_is_planned(found: dict, name: str) -> None:
    """Two volumes, or of blocks three for each part and each of a Hope's two segments; texts of one document."""
    for rank in found["plans"]:
        for layout in ("whole", "reshard", "two parts"):
            numbers = rank[f"{name}, {layout}"]["numbers"]
            assert numbers["counted"] == numbers["planned"]


def test_a_plan_counts_what_is_gathered() -> None:
    model = config_of("hope", "760m")
    train = TrainConfig(rows=32, length=4096, stream_length=1 << 16, steps=1000)
    config = RunConfig(train=train, parallel=ParallelConfig(accumulate=4, recompute=True))
    whole, freed = (
        plan(replace(config, parallel=replace(config.parallel, reshard=r)), model, 8, GPUS["h100"]) for r in (0, 1)
    )
    assert freed.bytes < whole.bytes - 8 * whole.parameters
    assert freed.seconds > whole.seconds  # blocks travel three times for every segment


@pytest.mark.parametrize(("options", "named"), [({"bptt": 1}, "bptt=1"), ({"outer": "sequence"}, "reads 8192 of hope")])
def test_gradients_through_freed_weights_are_refused(options: dict, named: str) -> None:
    config = config_of("hope", dim=16, depth=1, heads=2, periods=(16.0,), **options)
    with pytest.raises(ValueError, match=f"parallel.reshard needs .*{named}"):
        check_reshard(config, 8192)


def test_stretches_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel.reshard with parallel.sequence=2"):
        ParallelConfig(reshard=True, sequence=2)


@pytest.mark.parametrize("other", [{"train": TrainConfig(compile=True)}, {"optim": OptimConfig(matrices="dgd")}])
def test_compiled_blocks_and_dgd_are_refused(other: dict) -> None:
    with pytest.raises(ValueError, match="parallel.reshard with train.compile or optim.matrices=dgd"):
        RunConfig(parallel=ParallelConfig(reshard=True), **other)
