"""The recipe of knowledge incorporation: what its differences are, and that its page shows them."""

import json

import pytest

from nestling.evals.knowledge import Condition
from recipes.knowledge import MODELS, TIMES, conditions, line, page
from recipes.pretrained_reading import SETTINGS


def cell(shift: float = 0.0):
    """Two passages. Reading saves 1 bit of the answers and 0.25 of swapped ones; another passage saves 0.5 of both."""
    saved = {"nothing": (0, 0), "own": (1 + shift, 0.25), "another": (0.5, 0.5), "context": (2, 0)}
    made = [
        Condition(
            name=name,
            times=n,
            bits=(6 - right, 4 - right),
            swapped=(7 - wrong, 5 - wrong),
            exact=(0.0, 0.5),
            passage=None if name == "context" else (3 - right, 3 - right),
            questions=4,
        )
        for name, (right, wrong) in saved.items()
        for n in (TIMES if name in ("own", "another") else (0,))
    ]
    return json.loads(json.dumps({"conditions": [c.to_dict() for c in made], "cpu_seconds": 60.0}))


def test_the_differences_are_those_of_the_conditions_seed_by_seed() -> None:
    made = line([cell(), cell(0.2), cell(0.4)], TIMES[-1])
    assert made["bits"]["nothing"] == [5, 5, 5] and made["bits"]["own"] == pytest.approx([4, 3.8, 3.6])
    for what, mean in {"reading": 1.2, "this passage": 0.7, "facts": 0.95, "passage itself": 0.7}.items():
        seeds, passages = made[what]["over seeds"], made[what]["over passages"]
        assert (seeds["mean"], passages["mean"], seeds["n"], passages["n"]) == pytest.approx((mean, mean, 3, 2))
        assert seeds["high"] - mean == pytest.approx(0.2 / 3**0.5 * 4.302653, rel=1e-6)


def test_a_cell_gives_its_conditions_back() -> None:
    found = conditions(cell())
    assert found["own", TIMES[0]].bits == (5, 3) and found["context", 0].passage is None


def test_the_page_has_a_line_for_every_number_of_readings() -> None:
    lines = [line([cell(), cell(0.2)], n) for n in TIMES]
    metrics = {"models": {name: {"lines": lines, "cells": [cell(), cell()]} for name in MODELS}}
    shown = page({"seeds": [0, 1], "metrics": metrics, "config": {"passages": 2, "questions": 4}})
    assert shown.count("| hope | ") == 2 * len(TIMES)
    assert "5.00 | 3.90 | 4.50 | 3.00 | 5.75 | 1.10" in shown
    assert shown.endswith("2 passages, 4 questions.\n6.0 CPU minutes.")


def test_the_setting_of_the_pretrained_model_has_one_period() -> None:
    assert set(SETTINGS["one period"][0]) == {256}
