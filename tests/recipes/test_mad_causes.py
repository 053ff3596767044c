"""Changes of Hope on MAD: each is another model of equal parameters; what is chosen, compared and shown."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.evals.mad import MAD
from recipes import mad, mad_causes
from recipes.cells import Cell


@pytest.mark.parametrize("change", mad_causes.CHANGES)
def test_a_change_is_another_model_of_equal_parameters(change: str) -> None:
    task = MAD["compression"]
    tokens = task.examples(2, (32, 32), seed=0).tokens

    def logits(parts: mad_causes.Parts) -> tuple[int, torch.Tensor]:
        torch.manual_seed(0)
        model = mad.model_for("hope", task, parts)
        return sum(p.numel() for p in model.parameters()), model(tokens).logits

    (count, plain), (changed, found) = logits(mad_causes.HOPE), logits(mad_causes.CHANGES[change][0])
    assert abs(changed / count - 1) < 0.02
    assert torch.equal(plain, found) == (mad_causes.CHANGES[change][0] == mad_causes.HOPE)


def cells_of(*pairs: tuple[float, float]) -> list[Cell]:
    return [{"rate": 0.01, "validation": v, "accuracy": a, "cpu_seconds": 60.0} for v, a in pairs]


def test_validation_chooses_and_tested_answers_are_compared() -> None:
    cells = {"a": cells_of((0.5, 0.9), (0.5, 0.9)), "b": cells_of((0.6, 0.4), (0.5, 0.5))}
    assert mad_causes.best_of(cells) == "b"
    found = mad_causes.against(cells["b"], {"titans": cells_of((0.0, 0.2), (0.0, 0.3))})["titans"]
    assert found["mean"] == pytest.approx(0.2) and found["low"] == pytest.approx(0.2)


def test_a_report_from_cells_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table: Cell = {"rates": {"hope": 0.01, "retnet": 0.02}, "cells": {}}
    for task in ("compression", "memorization"):
        table["cells"][task] = {"retnet": cells_of((0, 0.1), (0, 0.1))}
    monkeypatch.setattr(mad_causes, "newest", lambda name: {"metrics": table})
    monkeypatch.setattr(mad_causes, "RUNS", tmp_path / "runs")
    changes = {"as in the table": (mad_causes.HOPE, 1), "half of the rate": (mad_causes.HOPE, 1 / 2)}
    monkeypatch.setattr(mad_causes, "CHANGES", changes)
    for task in table["cells"]:
        monkeypatch.setitem(mad.MAD, task, replace(MAD[task], length=8))
    for name, value in {"STEPS": 2, "TOKENS": 32, "TESTED": 4}.items():
        monkeypatch.setattr(mad, name, value)
    monkeypatch.setattr(mad_causes, "write_result", lambda recipe, config, seeds, metrics: metrics)
    metrics = mad_causes.report(["compression"], 2)
    assert [cells[0]["rate"] for cells in metrics["compression"]["cells"].values()] == [0.01, 0.005]
    assert len(list((tmp_path / "runs").iterdir())) == 8
    lines = mad_causes.page({"metrics": metrics}).splitlines()
    assert lines[0] == "| compression: right answers, % | rate | validation | tested |"
    assert lines[5] == f"| {metrics['compression']['best']} | compression | memorization |"
    assert [line.split(" | ")[0] for line in lines[7:9]] == ["| right answers, %", "| minus retnet"]
    best = metrics["compression"]["best"]
    assert lines[-5] == f"| compression: half of the rate | rate | tested | {best}, minus it |"
    assert lines[-2] == "" and lines[-3].startswith("| retnet | 0.01 | ")
    mad_causes.draw({"metrics": metrics}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
