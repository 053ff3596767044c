"""The recipe of common sense: intervals over seeds and items of made-up answers, and how its page reads."""

import json

import pytest

from nestling.evals.common_sense import REPORTED
from recipes.common_sense import AVERAGED, page, summary


def cell(items: str, n: int = 4):
    task = {"value": items.count("1") / n, "stderr": 0.1, "chance": 0.5, "n": n, "version": 1.0, "items": items}
    return {name: task for name in REPORTED} | {"perplexity of lambada": 50.0, "cpu_seconds": 30.0}


def test_percent_above_chance_over_seeds_and_over_items() -> None:
    made = summary([cell("1100"), cell("1110"), cell("1111")])
    piqa = made["piqa"]
    assert (piqa["percent"], piqa["chance"]) == pytest.approx((75, 50))
    assert piqa["over seeds"]["mean"] == pytest.approx(25) and piqa["over seeds"]["n"] == 3
    assert piqa["over seeds"]["high"] - 25 == pytest.approx(25 / 3**0.5 * 4.302653, rel=1e-6)
    assert piqa["over items"]["mean"] == pytest.approx(25) and piqa["over items"]["n"] == 4
    assert made["average"]["percent"] == pytest.approx(75) and set(AVERAGED) < set(REPORTED)


def test_one_checkpoint_has_intervals_over_items_only() -> None:
    models = {name: {"summary": summary(cells), "cells": cells} for name, cells in (("a", [cell("1100")]),)}
    shown = page(json.loads(json.dumps({"metrics": {"models": models}})))
    assert "| piqa (acc) | 50.0 | 50.0 [-91.9, 91.9] |" in shown
    assert shown.endswith("0.5 CPU minutes.") and "| perplexity of LAMBADA's last words | | 50 |" in shown
