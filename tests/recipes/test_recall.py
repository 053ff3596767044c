"""The recipes of MQAR and MAD: equal parameters, what is trained on and asked, rates, comparisons, tables, the grid."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.evals.mad import MAD
from nestling.evals.suite import NOTHING
from nestling.memories import SelfModifyingTitans
from nestling.models import LanguageModel
from recipes import mad, mqar
from recipes.cells import Cell
from recipes.recall import MODELS, RATES, against, best_rate, loss_on, make, shown, shown_difference


@pytest.mark.parametrize("name", MODELS)
def test_models_have_equal_parameters_and_every_one_of_them_learns(name: str) -> None:
    model = make(name, mqar.VOCABULARY, mqar.DIM)
    goal = make("hope", mqar.VOCABULARY, mqar.DIM).num_parameters()
    assert abs(model.num_parameters() / goal - 1) < 0.02
    loss_on(model, mqar.task(2).examples(2, (16, 16), seed=0)).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert {n for n in still if not n.endswith("rate_logit")} == set()  # of a chunk that is the first and the last


def test_queries_of_hope_start_as_keys_of_the_mean_of_two_tokens() -> None:
    layer = make("hope", mqar.VOCABULARY, mqar.DIM).blocks[0].mixer
    assert isinstance(layer, SelfModifyingTitans)
    (initial,) = layer.initial
    assert torch.equal(initial[:, layer.names.index("q")], initial[:, layer.names.index("k")])
    assert not torch.equal(initial[:, layer.names.index("v")], initial[:, layer.names.index("k")])
    x = torch.randn(1, 3, mqar.DIM)
    assert torch.allclose(layer.conv(x)[0][:, 1:], (x[:, 1:] + x[:, :-1]) / 2)


@pytest.mark.parametrize("task", mad.TASKS)
def test_models_of_mad_have_equal_parameters(task: str) -> None:
    counts = {name: sum(p.numel() for p in mad.model_for(name, MAD[task]).parameters()) for name in mad.MODELS}
    assert all(abs(count / counts["hope"] - 1) < 0.02 for count in counts.values())


def test_the_loss_is_the_mean_surprise_of_what_is_asked() -> None:
    model = make("hope", mqar.VOCABULARY, mqar.DIM)
    examples = mqar.task(2).examples(3, (16, 16), seed=0)
    logs = model(examples.tokens).logits.log_softmax(-1)
    asked = [
        -logs[b, t, target].item()
        for b, row in enumerate(examples.targets.tolist())
        for t, target in enumerate(row)
        if target != NOTHING
    ]
    assert len(asked) == 6
    assert loss_on(model, examples).item() == pytest.approx(sum(asked) / 6, rel=1e-5)


def test_a_batch_of_mqar_holds_every_number_of_pairs_and_its_seed_decides_it() -> None:
    made = mqar.batch(7)
    counts = (made.targets != NOTHING).sum(1).tolist()
    assert counts == [pairs for pairs in mqar.PAIRS for _ in range(mqar.BATCH // len(mqar.PAIRS))]
    assert torch.equal(made.tokens, mqar.batch(7).tokens)
    assert not torch.equal(made.tokens, mqar.batch(8).tokens)


def test_the_rate_of_the_highest_accuracy_is_chosen_and_the_first_among_equals() -> None:
    assert best_rate(dict(zip(map("{:g}".format, RATES), (0.2, 0.9, 0.5), strict=True))) == RATES[1]
    assert best_rate({f"{lr:g}": 0.5 for lr in RATES}) == RATES[0]


def test_hope_is_compared_seed_by_seed() -> None:
    found = against({"hope": [0.9, 0.8, 0.7], "a": [0.5, 0.4, 0.3], "b": [0.7, 0.8, 0.9], "c": [0.95, 0.86, 0.75]})
    assert {name: one["verdict"] for name, one in found.items()} == {
        "a": "better",
        "b": "no difference shown",
        "c": "worse",
    }
    assert found["a"]["mean"] == pytest.approx(0.4) and found["c"]["high"] < 0
    assert shown_difference(found["b"]).startswith("+0.0 [") and shown_difference(found["a"]).startswith("**+40.0 [")
    assert shown([0.5]) == "50.0" and shown([0.4, 0.5, 0.6]) == "50.0 ± 24.8"


def mqar_cell(right: float) -> Cell:
    return {"read": {f"{p}/{t}": right if p <= 8 and t == 32 else right / 2 for p, t in mqar.MORE + mqar.LONGER}}


def test_the_page_of_mqar_shows_each_part_and_the_differences() -> None:
    cells = {"hope": [mqar_cell(1.0)] * 3, "delta-net": [mqar_cell(0.5)] * 3}
    metrics = {"chosen rate": {"hope": 0.01, "delta-net": 0.005}, "cells": cells, "hope against": mqar.compared(cells)}
    lines = mqar.page({"metrics": metrics}).splitlines()
    assert lines[2] == "| hope | 0.01 | 100.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |"
    assert lines[-3].startswith("| delta-net | **+50.0 [+50.0, +50.0]** | **+25.0")


def test_a_cell_of_mqar_is_trained_read_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUNS": tmp_path, "STEPS": 2, "STRINGS": 4}.items():
        monkeypatch.setattr(mqar, name, value)
    made = mqar.run_cell("delta-net", 1e-2, 0)
    assert set(made["read"]) == {f"{p}/{t}" for p, t in mqar.MORE + mqar.LONGER}
    assert mqar.run_cell("delta-net", 1e-2, 0) == made and len(list(tmp_path.iterdir())) == 1


def test_the_decoder_of_compression_sees_the_last_output_and_the_place_only() -> None:
    task = replace(MAD["compression"], length=6)
    model = mad.model_for("delta-net", task)
    assert isinstance(model, mad.Compressor)
    tokens = task.examples(2, (6, 6), seed=0).tokens
    logits = model(tokens).logits
    assert logits.shape == (2, 6, task.vocab_size)
    seen: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model(tokens)
    differences = seen[0] - mad.positions(6, mad.DIM)
    assert torch.allclose(differences, differences[:, -1:].expand_as(differences), atol=1e-6)
    assert len(mad.positions(6, mad.DIM).unique(dim=0)) == 6


def test_only_compression_has_a_decoder() -> None:
    assert [t for t in mad.TASKS if not isinstance(mad.model_for("delta-net", MAD[t]), LanguageModel)] == [
        "compression"
    ]


def test_the_pool_is_no_larger_than_the_authors_and_no_larger_than_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mad, "STEPS", 3)
    assert len(mad.pool(MAD["memorization"], rows=200, seed=0)) == 256
    recall = mad.pool(MAD["in-context-recall"], rows=4, seed=0)
    assert len(recall) == 12 and bool((recall.targets != NOTHING).all())  # every next token in training


def test_the_grid_has_the_base_settings_and_one_change_each() -> None:
    made = mad.grid()
    assert set(mad.TASKS) <= {task.name for task in made.values()} and len(made) == 6 + 10 + 10 + 12 + 5 + 13 + 10
    for label, task in made.items():
        base = MAD[task.name]
        changed = {field for field in vars(task) if getattr(task, field) != getattr(base, field)}
        assert changed == (set() if label.endswith("base") else {label.split()[1].split("=")[0]})
        least = 6 if task.name == "memorization" else task.length
        assert len(task.examples(1, (least, least), seed=0)) == 1


def test_one_tiny_cell_of_the_grid_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"compression length=8": replace(MAD["compression"], length=8)}
    for name, value in {"RUNS": tmp_path, "STEPS": 2, "TOKENS": 32, "TESTED": 4}.items():
        monkeypatch.setattr(mad, name, value)
    monkeypatch.setattr(mad, "grid", lambda: small)
    monkeypatch.setattr(mad, "rate_of", lambda name: 1e-2)
    mad.main(["--grid", "--models", "delta-net", "--tasks", "compression", "--seeds", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["compression-length=8-2-delta-net-0.json"]


def test_the_page_of_mad_has_a_column_for_each_task_and_their_mean() -> None:
    def seeds(accuracy: float) -> list[Cell]:
        return [{"accuracy": accuracy, "cpu_seconds": 60.0}] * 3

    cells = {"a": {"hope": seeds(1.0), "retnet": seeds(0.5)}, "b": {"hope": seeds(0.5), "retnet": seeds(0.5)}}
    against_each = {task: against(mad.accuracies(found)) for task, found in cells.items()}
    metrics = {"rates": {"hope": 0.01, "retnet": 0.02}, "cells": cells, "hope against": against_each}
    lines = mad.page({"metrics": metrics}).splitlines()
    assert lines[2] == "| hope | 0.01 | 100.0 ± 0.0 | 50.0 ± 0.0 | 75.0 ± 0.0 |"
    assert lines[-1] == "CPU minutes: 12" and "+0.0 [+0.0, +0.0]" in lines[-3]
