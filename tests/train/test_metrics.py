"""metrics.jsonl, what stands in it, and the lines that show it."""

import json
import sys
import types

import pytest
import torch

from nestling.train.metrics import MetricsFile, cut_back, peak_memory, read_metrics
from nestling.train.progress import OneLine, PlainLines, scalars, terminal

RECORD = {
    "step": 3,
    "loss": 2.5,
    "lr": 1e-3,
    "tokens_per_second": 1234.5,
    "peak_memory": 3 << 20,
    "writes": [4, 2],
    "validation": {"loss": 2.25},
}


def test_lines_are_cut_back_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in range(1, 8):
            metrics.append({"step": step, "loss": 0.1 * step})
        metrics.sync()
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 8))
    cut_back(path, 5)
    assert read_metrics(path) == [{"step": step, "loss": 0.1 * step} for step in range(1, 6)]
    assert path.read_text().endswith("}\n") and list(tmp_path.iterdir()) == [path]
    cut_back(path, 0)
    assert path.read_text() == ""


def test_cutting_back_without_a_file_makes_an_empty_one(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_lines_are_standard_json(tmp_path):
    with MetricsFile(tmp_path / "m") as metrics:
        metrics.append({"step": 1, "validation": {"loss": float("nan"), "other": float("inf")}})
    assert json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)["validation"]["loss"] is None


def test_peak_memory_grows_with_use():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) >= before > 1 << 20 and held[0] == 1


def test_plain_lines(capsys):
    lines = PlainLines(steps=4, done=0)
    for step in (1, 2, 3, 4):
        lines.update({**RECORD, "step": step, "validation": {}} if step != 3 else RECORD)
    lines.close()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown if "held-out" in line] == ["3/4"] and shown[-1].startswith("step 4/4")
    for part in ("loss 2.5000", "held-out loss 2.2500", "1,234 tokens/s", "3 MiB", "writes [4, 2]", "left 0:00"):
        assert any(part in line for line in shown)


def test_a_terminal_gets_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = terminal(6, 0)
    assert isinstance(line, OneLine)
    line.update(RECORD)
    line.close()
    shown = capsys.readouterr().err
    assert shown.startswith("\r\x1b[2K[##########          ] step 3/6") and shown.count("\n") == 1


def test_scalars_of_a_record():
    assert scalars({"a": 1, "b": {"c": 2.0}, "d": [3, 4]}) == {"a": 1, "b/c": 2.0, "d/0": 3, "d/1": 4}


def test_tensorboard_is_named_when_missing(tmp_path, monkeypatch):
    from nestling.train.progress import TensorBoard

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'nestling\[track\]'"):
        TensorBoard(tmp_path, 0)


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    from nestling.train.progress import TensorBoard

    seen = {}

    class Writer:
        def __init__(self, folder, purge_step):
            seen["purge"] = purge_step

        def add_scalar(self, name, value, step):
            seen[name] = (value, step)

        def close(self):
            seen["closed"] = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    board = TensorBoard(tmp_path, 2)
    board.update(RECORD)
    board.close()
    assert seen["purge"] == 3 and seen["loss"] == (2.5, 3) and seen["writes/1"] == (2, 3) and seen["closed"]
