"""The recipe of in-context recall: equal parameters, every part of its loss, and how its table reads."""

import json

import pytest
import torch
from torch.nn import functional as F

from nestling.data import ByteTokenizer
from nestling.evals.in_context_recall import Entry, records
from nestling.evals.suite import NOTHING, Examples
from nestling.models import Output
from recipes.in_context_recall import BINS, MODELS, TASKS, against, batch, line, loss_on, make, page


def test_models_have_equal_parameters() -> None:
    sizes = {name: make(name).num_parameters() for name in MODELS}
    assert max(sizes.values()) / min(sizes.values()) < 1.02


def test_the_loss_is_that_of_the_asked_tokens_and_of_all() -> None:
    examples = Examples(torch.tensor([[3, 4, 5, 0]]), torch.tensor([[NOTHING, 5, NOTHING, NOTHING]]))
    logits = torch.randn(1, 4, 8)
    found = loss_on(lambda tokens, state=None, learn=True: Output(logits, None), examples)  # type: ignore[arg-type]
    asked = F.cross_entropy(logits[0, 1:2], torch.tensor([5]))
    every = F.cross_entropy(logits[0, :2], torch.tensor([4, 5]))  # the last target is padding
    assert found.item() == pytest.approx((asked + every).item())


def test_a_batch_holds_both_tasks_padded_to_one_length() -> None:
    entries = [Entry(f"L {i}", "k", f"a {i}") for i in range(9)]
    made = batch({"a": records(entries, ByteTokenizer()), "b": records(entries[:3], ByteTokenizer())}, 0)
    assert len(made) == 12 and made.tokens.shape == made.targets.shape and (made.targets != NOTHING).any(1).all()


def cell(right: float, bits: float):
    made = {}
    for task in TASKS:
        made[task] = {"right, %": right, "bits": bits, "values": 10}
        made[f"{task}, no document"] = {"right, %": 10.0, "bits": 4.0, "values": 10}
    return made


def test_bits_saved_and_verdicts_are_paired_by_seed() -> None:
    cells = [cell(50.0, 1.0), cell(60.0, 0.9), cell(70.0, 0.8)]
    made = line(cells)
    assert made["records"]["right, %"]["mean"] == pytest.approx(60)
    assert made["cloze"]["bits saved"]["mean"] == pytest.approx(3.1)
    size = f"{BINS[0][0]}-{BINS[0][1]}"
    mine, theirs = [{size: c} for c in cells], [{size: cell(40.0, 2.0)}] * 3
    found = against(mine, theirs, "records")
    assert found["bits"]["mean"] == pytest.approx(-1.1) and found["verdict"] == "better"
    metrics = {
        "models": {"hope": {"lines": {size: made}, "trained": [{"cpu_seconds": 120.0}]}},
        "as they are": {"transformer": {"line": line(cells[:1]), "cells": []}},
        "hope against": {"transformer": {"records": found}},
    }
    shown = page(json.loads(json.dumps({"metrics": metrics})))
    assert "| hope | 32-64 | 60.0 [35.2, 84.8] | 10.0 | 3.10 [2.85, 3.35] |" in shown
    assert "| transformer, as it is | | 50.0 | 10.0 | 3.00 |" in shown
    assert (
        "hope against transformer: records better (-1.10 [-1.35, -0.85] bits)" in shown and "2.0 CPU minutes" in shown
    )
