"""The recipes about language: what is trained on and held out, equal parameters, saved cells, and how tables read."""

import copy
import lzma
import math
from pathlib import Path

import pytest
import torch

from nestling.data import bundled_text
from nestling.evals.perplexity import window_losses
from nestling.models import build, from_config
from nestling.models.presets import count
from recipes import ablations, dynamic_evaluation, language, language_modelling
from recipes.language import LENGTH, SIZES

NAMES = (*language.TRAINED, *language.NOVELS, *language.TEST)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data files with stretches of a bundled text, and a recipe that takes two steps on it."""
    text = bundled_text("shakespeare")
    for i, name in enumerate(NAMES):
        path = tmp_path / f"lm/{name}.txt.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(f"file {i}.\n{text[40_000 * i : 40_000 * (i + 1)]}".encode(), preset=0))
    small = {"STEPS": 2, "LONG": 512, "LONG_WINDOWS": 1, "SHORT_WINDOWS": 2, "ROWS": 1, "PIECES": 300}
    for name, value in small.items():
        monkeypatch.setattr(language, name, value)
    monkeypatch.setattr(language, "RUNS", tmp_path / "runs")
    language.corpus.cache_clear()
    language.long_windows.cache_clear()
    yield tmp_path
    language.corpus.cache_clear()
    language.long_windows.cache_clear()


def test_the_last_tenth_of_each_trained_file_is_held_out_and_the_rest_is_never_seen(folder: Path) -> None:
    found = language.corpus(folder)
    training = found.tokenizer.decode(found.training.take(0, len(found.training)))
    held_out = found.tokenizer.decode(found.held_out.take(0, len(found.held_out)))
    files = dict(zip(NAMES, language.documents(NAMES, folder), strict=True))
    assert len(found.training.starts) == len(found.held_out.starts) == len(language.TRAINED)
    for name, text in files.items():
        assert (text[:100] in training) == (name in language.TRAINED)
        assert (text[-100:] in held_out) == (name in language.TRAINED)
        assert text[-100:] not in training
    assert found.bytes_per_token == len(held_out.encode()) / len(found.held_out)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", language_modelling.MODELS)
def test_models_of_a_size_have_equal_parameters(name: str, size: str) -> None:
    goal = count(language.config_for("transformer", size))
    assert abs(count(language.config_for(name, size)) / goal - 1) < 0.02


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_variants_change_hope_at_equal_parameters(variant: str) -> None:
    changed = ablations.VARIANTS[variant]
    config = language.config_for("hope", ablations.SIZE, **changed)
    assert abs(count(config) / count(language.config_for("hope", ablations.SIZE)) - 1) < 0.02
    assert all(getattr(config, name) == value for name, value in changed.items())
    assert (config.periods == language.LEVELS["periods"]) == (variant != "without CMS" and "one period" not in variant)


def test_a_cell_is_kept_with_its_weights_and_a_seed_decides_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = language.config_for("hope", "small", periods=(64.0, 128.0, math.inf))
    first = language.measured("hope", config, 1e-3, 0, folder)
    assert first == language.measured("hope", config, 1e-3, 0, folder)
    monkeypatch.setattr(language, "RUNS", folder / "other")
    again = language.measured("again", config, 1e-3, 0, folder)
    other = language.measured("other", config, 1e-3, 1, folder)
    assert first | {"cpu_seconds": 0} == again | {"cpu_seconds": 0} and first["loss"] != other["loss"]
    model = from_config(config)
    model.load_state_dict(torch.load(folder / "runs" / "hope-0.001-0.pt", weights_only=True))
    novels = language.long_losses(model, *language.long_windows(language.NOVELS, folder))
    assert novels["learning"]["beyond"] == pytest.approx(first["novels"]["learning"]["beyond"], rel=1e-4)
    assert set(first["test"]) == {"frozen", "learning"} and first["novels"] != first["test"]
    assert first["test"]["learning"]["beyond"] != first["test"]["frozen"]["beyond"]


def test_losses_inside_and_beyond_the_training_length() -> None:
    torch.manual_seed(0)
    model = build("transformer", vocab_size=16, dim=8, depth=1, heads=1)
    windows = torch.randint(16, (2, language.LONG + 1))
    found = language.long_losses(model, windows, 2.0)
    full, window = found["full"], found["window"]
    curve = full["by position"]
    assert len(curve) == language.LONG // LENGTH == 32
    assert curve[0] == pytest.approx(window["by position"][0])
    assert full["beyond"] == pytest.approx(sum(curve[1:]) / 31) and full["late"] == pytest.approx(sum(curve[16:]) / 16)
    assert full["beyond"] != pytest.approx(window["beyond"], abs=1e-6)
    assert language.bits([{"text": found}], "text", "beyond", ("full", "window")) == [
        min(full["beyond"], window["beyond"])
    ]


def test_the_rate_with_the_least_loss_on_novels_is_chosen() -> None:
    def swept(*values: float) -> dict[str, dict[str, float]]:
        return {f"{lr:g}": {"novels": v} for lr, v in zip(language.RATES, values, strict=True)}

    assert language.chosen_rate(swept(2.0, 1.5, 1.6)) == language.RATES[1]
    assert language.chosen_rate(swept(2.0, 1.5, 1.5)) == language.RATES[1]


def made(value: float, ways: tuple[str, ...]) -> dict[str, object]:
    """A cell whose every loss is `value`, and 1 more in the second way to read it."""
    text = {way: {"late": value + i, "beyond": value + i, "by position": [value + i] * 4} for i, way in enumerate(ways)}
    return {"rate": 0.01, "parameters": 100, "held out": value, "novels": text, "test": text, "cpu_seconds": 30.0}


def test_hope_is_compared_with_the_better_transformer_seed_by_seed() -> None:
    ways = {"transformer": ("window", "full"), "hope": ("learning", "frozen")}
    models = {
        name: [made(start + step, ways.get(name, ("frozen",))) for step in (0.0, 0.25, 0.5)]
        for name, start in (("transformer", 2.0), ("gated-delta-net", 1.0), ("titans-lmm", 0.5), ("hope", 1.0))
    }
    found = language_modelling.compare(models)
    assert found["hope, writing - transformer"]["novels"]["mean"] == -1.0
    assert found["hope, writing - transformer"]["novels"]["verdict"] == "better"
    assert found["hope - titans-lmm"]["held out"]["verdict"] == "worse"
    assert found["hope - gated-delta-net"]["held out"]["verdict"] == "no difference shown"
    assert found["hope, writing - hope"]["WikiText-2"]["mean"] == -1.0
    rates = dict.fromkeys(models, 0.01) | {"titans-lmm": 0.02}
    result = {"metrics": {"chosen rate": rates, "models": {"small": models}, "comparisons": {"small": found}}}
    text = language_modelling.page(result)
    assert (
        "| titans-lmm | 0.750 ± 0.621 |" in text
        and "| hope, writing - transformer | **-1.000 [-1.000, -1.000]** |" in text
        and text.endswith("6 CPU minutes together.")
    )


def test_a_model_that_diverges_takes_a_lower_rate_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = sorted(language.RATES)
    asked: list[tuple[float, int]] = []

    def measured(label: str, config: object, lr: float, seed: int, folder: object) -> dict[str, object]:
        asked.append((lr, seed))
        return {"loss": None if (lr, seed) == (third, 1) or lr == first else lr}

    monkeypatch.setattr(language, "measured", measured)
    cells = language_modelling.run_model("hope", "small", third, 2, None)
    assert [(c["rate"], c["loss"]) for c in cells] == [(second, second)] * 2
    assert asked == [(third, 0), (third, 1), (second, 0), (second, 1)]
    assert language_modelling.run_model("hope", "small", first, 2, None) == []


def test_variants_are_paired_with_the_same_seeds_of_hope(tmp_path: Path) -> None:
    ways = ("learning", "frozen")
    cells = {
        "Hope": [made(v, ways) for v in (1.0, 2.0, 3.0)],
        "without CMS": [made(v, ("frozen",)) for v in (1.5, 2.5, 3.5)],
        "without DGD": [made(v, ways) for v in (1.0, 2.5)],
    }
    found = ablations.differences(cells)
    assert set(found) == {"without CMS", "without DGD"}
    assert found["without CMS"]["novels"]["mean"] == 0.5 and found["without CMS"]["novels"]["verdict"] == "worse"
    assert found["without DGD"]["novels"]["n"] == 2 and found["without DGD"]["novels"]["mean"] == 0.25
    metrics = {"cells": cells, "differences to Hope": found}
    text = ablations.page({"metrics": metrics})
    assert "| without DGD | +0.250" in text and "| 13.41 |" in text and "**+0.500" in text
    ablations.draw({"metrics": metrics}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_whole_hope_of_the_ablations_is_the_one_of_the_language_models() -> None:
    labels = [ablations.label(variant) for variant in ablations.VARIANTS]
    assert labels[0] == f"hope-{language.SWEPT}" and len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["transformer", "gated-delta-net", "hope"])
def test_dynamic_evaluation_reads_a_segment_before_it_learns_from_it(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = language.readers(from_config(language.config_for(name, "tiny")))
    reader = model["window" if name == "transformer" else "frozen"][0]
    windows, _ = language.long_windows(language.NOVELS, folder)
    still = window_losses(reader, windows, learn=False)[0]
    before = [p.detach().clone() for p in reader.parameters()]
    same = dynamic_evaluation.read(copy.deepcopy(reader), windows[0], "sgd", 0.0)
    learned = dynamic_evaluation.read(copy.deepcopy(reader), windows[0], "sgd", 0.1)
    assert torch.allclose(same, still, atol=1e-4)
    assert torch.allclose(learned[:LENGTH], still[:LENGTH], atol=1e-4)
    assert learned[LENGTH:].mean() < still[LENGTH:].mean() - 0.01
    made, none = (dynamic_evaluation.losses(reader, "novels", "adam", lr, folder) for lr in (1e-3, 0.0))
    frozen = language.long_losses(reader, *language.long_windows(language.NOVELS, folder))[
        "frozen" if name != "transformer" else "full"
    ]
    assert none["by position"] == pytest.approx(frozen["by position"], rel=1e-4)
    assert made["by position"][0] == pytest.approx(frozen["by position"][0], rel=1e-4)
    assert made["beyond"] < frozen["beyond"] - 0.01
    assert all(map(torch.equal, before, reader.parameters()))


def test_what_diverged_is_not_chosen() -> None:
    swept = {"sgd 0.1": {"novels": 2.0}, "sgd 1": {"novels": None}, "adam 0.001": {"novels": 1.9}}
    assert dynamic_evaluation.chosen(swept) == ("adam", 0.001)
