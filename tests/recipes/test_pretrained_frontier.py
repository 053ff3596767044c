"""The frontier of the pretrained model: what fine-tuning reads, what is read off a curve, how its tables read."""

import pytest
import torch
from torch import Tensor

from nestling.evals.frontier import Point
from recipes.pretrained_frontier import CONTEXT, PERIOD, TEXTS, WAYS, forgetting_at, page, plain_name, windows


@pytest.mark.parametrize("length", [2, PERIOD, PERIOD + 1, 3 * PERIOD + 17])
def test_every_token_but_the_first_is_asked_once_with_all_the_context_there_is(length: int) -> None:
    tokens, asked_before = torch.arange(length)[None], 0
    seen: list[Tensor] = []
    for window, asked in windows(tokens):
        assert window[0, -1] == asked_before + asked
        assert window.shape[1] - 1 == min(CONTEXT, asked_before + asked)
        seen.append(window[0, -asked:])
        asked_before += asked
    assert torch.equal(torch.cat(seen), tokens[0, 1:])


def test_forgetting_is_read_off_the_first_line_that_gains_enough() -> None:
    points = [Point(rate=1, gain=10, forgetting=1), Point(rate=2, gain=20, forgetting=3)]
    assert forgetting_at(points, 5) == 0.5
    assert forgetting_at(points, 15) == 2
    assert forgetting_at(points, 21) is None


def test_names_of_ways_are_names_of_files() -> None:
    assert len({plain_name(name) for name in WAYS}) == len(WAYS)
    assert all(name.replace("_", "").isalnum() for name in map(plain_name, WAYS))


def test_the_page_shows_both_texts_and_what_no_rate_reached() -> None:
    curve = {"gain at forgetting": {"1": 12.34}, "forgetting at gain": {"15": None}}
    curve |= {"cells": [{"cpu_seconds": 60.0}]}
    kept = {"at once": 5.0, "after another novel": 1.0, "forgetting": 0.25}
    result = {"metrics": {"ways": {"plain": dict.fromkeys(TEXTS, curve)}, "kept": {"one period": kept}}}
    lines = page(result).splitlines()
    assert "| plain | 12.34, 12.34 | –, – |" in lines
    assert "| one period | 5.00 | 1.00 | 0.25 |" in lines
    assert lines[-1] == "2 CPU minutes."
