"""Rounds, memory and slopes. No test looks at a time."""

import pytest
import torch

from nestling.bench.long import OneSequence, alone, decoding, lengths, slope, slopes, stream
from nestling.bench.measure import Timing, ceilings, forget_peak, peak_bytes, resident, side_by_side, threads
from nestling.bench.table import COLUMNS, render


def test_works_take_turns_after_a_warm_up() -> None:
    called = []
    works = {name: (lambda n=name: called.append(n)) for name in "ab"}
    found = side_by_side(works, repeats=3)
    assert called == list("ab" * 4)
    assert {len(t.seconds) for t in found.values()} == {3}


def test_timing_gives_the_median_and_the_range() -> None:
    told = Timing((3.0, 1.0, 9.0), (4.0, 2.0, 8.0)).to_dict()
    assert told == {"seconds": 3.0, "fastest": 1.0, "slowest": 9.0, "repeats": 3, "wall": 4.0}


def test_peak_memory_counts_temporaries_and_what_is_freed() -> None:
    def work():
        x = torch.zeros(250_000)  # 1 MB
        y = (x + 1) * 2  # two more, of which one is a temporary
        del x
        return y.sum()

    work()
    assert peak_bytes(work) == pytest.approx(3e6, rel=0.01)


def test_memory_of_the_process_sees_what_is_held_only_for_a_while() -> None:
    forget_peak()
    before = resident()
    torch.ones(25_000_000)
    assert 90e6 < resident() - before < 200e6
    forget_peak()
    assert resident() - before < 50e6


def test_a_process_of_its_own_fails_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="nonsense of 8 tokens failed in its own process: KeyError"):
        alone(OneSequence(name="nonsense", size=8))


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_ceilings_are_positive() -> None:
    assert all(v > 0 for v in ceilings(size=16, numbers=1000, repeats=1).values())


def test_slope_of_powers() -> None:
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_lengths_decoding_and_stream_give_rows_of_their_tables() -> None:
    measured = {
        "length": lengths(sizes=(16, 32), dim=16, heads=1, names=("transformer block", "self-modifying"), repeats=1),
        "decode": decoding(contexts=(8, 16), names=("transformer",), steps=2, repeats=1),
        "stream": stream(tokens=96, every=48, decode_at=())["stream"],
    }
    for kind, rows in measured.items():
        lines = render(rows, kind, markdown=True).splitlines()
        assert len(lines) == 2 + len(rows)
        assert {line.count("|") for line in lines} == {len(COLUMNS[kind]) + 1}
    assert set(slopes(measured["length"])) == {"transformer block", "self-modifying"}
    assert measured["stream"][-1]["tokens"] == 96
    small, large = (row["state_bytes"] for row in measured["decode"])
    assert large > small
