"""The two tables of evidence: one seed is one run whatever stands beside it, and the verdicts follow the rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recipes import optimizer_continual
from recipes.cells import rounded
from recipes.optimizer_damage import AMOUNTS, NOISE, ORDER, UNITS, compare, train
from recipes.optimizer_zoo import ZOO
from recipes.task_streams import split_classes
from recipes.vision_tasks import MLP, Images


def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(200, 28, 28, generator=generator), torch.arange(200) % 10)


def weights(name: str, kind: str, amount: float, rate: float = 0.01) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in train(name, rate, kind, amount, images(), 1, steps=3).parameters()])


def test_amount_zero_of_every_damage_is_none() -> None:
    clean = weights("SGD-momentum", "none", 0)
    for kind in UNITS:
        assert torch.equal(weights("SGD-momentum", kind, 0), clean)


@pytest.mark.parametrize("kind", UNITS)
def test_every_damage_changes_the_run_and_repeats_by_seed(kind: str) -> None:
    amount = AMOUNTS[kind][2]
    damaged = weights("SGD-momentum", kind, amount)
    assert torch.equal(damaged, weights("SGD-momentum", kind, amount))
    assert not torch.equal(damaged, weights("SGD-momentum", "none", 0))


@pytest.mark.parametrize("name", ZOO)
def test_every_optimizer_runs_damaged(name: str) -> None:
    for kind in (NOISE, ORDER):
        assert weights(name, kind, AMOUNTS[kind][1], ZOO[name].default / 9).isfinite().all()


def test_a_run_that_diverges_ends() -> None:
    assert len(weights("SGD-momentum", "none", 0, rate=1e30)) == 118_282


def test_verdicts_follow_the_rule() -> None:
    steady = {name: [0.5, 0.6, 0.7] for name in ("AdamW", "SGD-momentum", "Muon", "M3, no slow memory")}
    made = compare({**steady, "M3": [0.52, 0.621, 0.719]})
    assert made["M3"]["minus AdamW"]["verdict"] == "better"
    assert made["M3"]["minus AdamW"]["interval"] == pytest.approx([0.02, 0.02 - 0.0024841, 0.02 + 0.0024841], abs=1e-6)
    assert made["Muon"]["minus AdamW"]["verdict"] == "no difference shown"
    assert made["M3"]["minus M3, no slow memory"] == made["M3"]["minus AdamW"]
    assert "minus Muon" not in made["Muon"] and "minus M3, no slow memory" not in made["Muon"]


def test_less_forgetting_is_better_and_divergence_is_worst() -> None:
    streams = optimizer_continual.streams(None)
    runs = {"average": 0.5, "learned": 0.9, "forgetting": 0.3}
    numbers = {name: [{k: v + 0.01 * seed for k, v in runs.items()} for seed in range(3)] for name in ZOO}
    numbers[optimizer_continual.SLOWER] = numbers["M3"]
    numbers["M3"] = [v | {"forgetting": v["forgetting"] - 0.1 - 1e-3 * i} for i, v in enumerate(numbers["M3"])]
    made = optimizer_continual.differences(streams["permuted MNIST"], numbers)["M3 minus M3, no slow memory"]
    assert (made["forgetting"]["verdict"], made["average"]["verdict"]) == ("better", "no difference shown")
    text = streams["three texts"]
    assert text.goodness(2.0) > text.goodness(3.0) > text.goodness(math.nan) == -math.inf


def test_a_stream_is_swept_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("AdamW", "Muon")
    monkeypatch.setattr(optimizer_continual, "RUNS", tmp_path)
    monkeypatch.setattr(optimizer_continual, "ENTRIES", {name: ZOO[name] for name in names})
    monkeypatch.setattr(optimizer_continual, "PAIRS", [names[::-1]])
    stream = optimizer_continual.Stream(
        lambda seed, sweep: split_classes(images(), images(), 2, 20, 2, seed), lambda: MLP(8), 2, 2, ()
    )
    swept = {name: optimizer_continual.chosen("s", stream, name, ("all classes", "learned")) for name in names}
    for found in swept.values():
        best = max(made["all classes"]["learned"] for made in found["by rate"].values())
        assert found["by rate"][f"{found['rate']:.3g}"]["all classes"]["learned"] == best
    rates = {name: found["rate"] for name, found in swept.items()}
    made = optimizer_continual.measured("s", stream, rates, "all classes")
    muon = made["optimizers"]["Muon"]
    assert len(muon["matrix"]) == len(muon["seeds"]["average"]) == 2
    assert muon["intervals"]["average"][0] == pytest.approx(sum(muon["matrix"][1]) / 2)
    assert json.loads(json.dumps(rounded(made), allow_nan=False)) == rounded(made)
    assert rounded([math.nan, 0.123456789]) == [None, 0.12346]
