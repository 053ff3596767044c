"""Result files, tables and the figure are made from records alone."""

import json
from pathlib import Path

import pytest

from benchmarks import counts, plots, report, rivals, run, targets
from nestling.bench import OPS, Shape, layers, lengths, slopes
from nestling.bench import ops as measure_ops
from recipes.cells import record

MACHINE = {"flops": 1e11, "flops of width 64": 5e10, "bandwidth": 1e10}


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    """Real measurements, of the smallest sizes."""
    shape = Shape(rows=1, tokens=8, heads=1, width=4, chunk_size=4)
    some = layers(MACHINE, dim=16, heads=1, rows=1, tokens=16, chunk_size=8, repeats=1)
    grown = lengths(sizes=(16, 32), dim=16, heads=1, names=("transformer block", "self-modifying"), repeats=1)
    made = {
        "machine": {"1 thread": MACHINE},
        "ops": {"rows": measure_ops(MACHINE, shape, loop_tokens=4, repeats=1, cases={"titans": OPS["titans"]})},
        "layers": {"1 thread": some, "2 threads": some},
        "chunks": {"rows": some},
        "length": {"rows": grown, "slopes": slopes([*grown, *({**r, "name": "hope"} for r in grown)])},
    }
    return {name: record(f"bench {name}", {}, [0], metrics) for name, metrics in made.items()}


def test_result_files_have_every_key_and_come_back(records, tmp_path: Path) -> None:
    for made in records.values():
        path = report.write(made, tmp_path)
        assert set(report.KEYS) == set(json.loads(path.read_text()))
        assert made["date"] in path.name
    assert set(report.newest(tmp_path)) == set(records)


def test_a_result_without_its_key_or_too_large_is_refused(records, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks \\['commit'\\]"):
        report.write({k: v for k, v in records["ops"].items() if k != "commit"}, tmp_path)
    with pytest.raises(ValueError, match="fewer than 200,000"):
        report.write(records["ops"] | {"config": "x" * 200_000}, tmp_path)


def test_tables_are_filled_between_their_markers(records) -> None:
    page = "\n".join(f"<!-- table: {name} -->\nold\n<!-- end -->" for name in report.TABLES)
    filled = report.fill(page, records)
    assert "old" not in filled
    assert report.fill(filled, records) == filled
    assert filled.count("not measured") >= filled.count("| target") > 0
    assert "| self-modifying | forward + backward |" in filled
    with pytest.raises(ValueError, match="asks for table 'ops2'"):
        report.fill("<!-- table: ops2 -->\n<!-- end -->", records)


def test_the_figure_is_drawn_with_and_without_results(records, tmp_path: Path) -> None:
    for some in (records, {}):
        plots.draw(some, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_every_target_belongs_to_a_part_and_says_what_it_asks() -> None:
    assert {target.part for target in targets.TARGETS} <= set(run.PARTS)
    one = targets.Target(what="x", part="machine", least=2, most=3, measured=lambda r: r["machine"])
    assert one.line({"machine": 2.5}) == "| x | 2 to 3× | 2.5× | met |"
    assert one.line({"machine": 3.5}).endswith("| MISSED |")
    assert "not measured" in one.line({})


def test_counts_know_every_op() -> None:
    table = counts.table(MACHINE)
    assert all(f"| op {name} |" in table for name in OPS)


def test_committed_results_are_whole() -> None:
    root = Path(__file__).parents[2] / report.RESULTS
    for path in root.glob("*.json"):
        assert path.stat().st_size < 200_000
        assert set(report.KEYS) == set(json.loads(path.read_text(encoding="utf-8"))), path.name


def test_our_own_layers_need_no_package_and_ratios_are_of_the_fastest() -> None:
    ours = [r for r in rivals.RIVALS if r.package is None]
    assert [r.name for r in ours][:2] == ["transformer block", rivals.OURS]
    rows = [
        {"name": name, "training": True, "five": five, "tokens_per_second": speed}
        for name, five, speed in ((rivals.OURS, "yes", 80.0), ("a: x", "yes", 2.0), ("b: y", "no", 50.0))
    ]
    assert rivals.times_the_fastest(rows) == {"training": 40.0}
