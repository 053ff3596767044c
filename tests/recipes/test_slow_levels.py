"""The recipe of slow levels: its streams, what outlives a document, how a setting is chosen, how its table reads."""

import lzma

import pytest
import torch

from tests.hf.needs import need

need("transformers")

from recipes import slow_levels as recipe  # noqa: E402
from recipes.command import newest  # noqa: E402
from recipes.slow_levels import ARMS, Setting  # noqa: E402

LENGTH = 24


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of made-up texts, short documents, and a model that samples little."""
    monkeypatch.setattr(recipe, "LENGTH", LENGTH)
    monkeypatch.setattr(recipe, "PIECE", 400)
    monkeypatch.setattr(
        "nestling.hf.own_text.own_text", lambda model, seed: (torch.arange(48) * 37 % 509 + 3).view(2, 24)
    )
    for name in ("lm/gutenberg/novel", "lm/wiki", "lm/tinyshakespeare_train"):
        path = tmp_path / f"{name}.txt.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress("".join(f"{name} says {i}. " for i in range(200)).encode()))
    (tmp_path / "mt").mkdir()
    rows = "".join(f"ref\tword{i} nach\tword\n" for i in range(99))
    (tmp_path / "mt" / "bible_x.tsv.xz").write_bytes(lzma.compress(f"ref\tx\teng\n{rows}".encode()))
    return str(tmp_path)


STREAM = ("novel", "bible_x", "wiki", 0.5, 0.1)


def test_a_stream_comes_back_to_each_kind_where_it_left(small):
    from nestling.hf.llama2c import read_tokenizer

    found = recipe.documents(STREAM, small)
    assert found.shape == (8, LENGTH)
    tokenizer = read_tokenizer(recipe.DATA / "tok512.bin.xz")
    for i, text in enumerate(recipe.texts(STREAM, small)):
        both = tokenizer.decode(torch.cat([found[i], found[4 + i]]).tolist())
        assert text.startswith(both.rstrip("�")) and len(both) > LENGTH


def test_what_outlives_a_document(small):
    stream = recipe.documents(STREAM, small)[None, :2]
    moved = {}
    for name, periods, setting in (
        ("all", (8,), Setting((0.5,), (0.0,))),
        ("half", (8,), Setting((0.5,), (0.0,), 0.5)),
        ("two", (8, 16), Setting((0.5, 0.2), (0.0, 0.0))),
    ):
        _, state = recipe.read(recipe.converted(periods, setting), stream[:, :1], kept=setting.kept)
        levels = list(state.tree.fast.values())[: len(periods)]
        moved[name] = [sum(float(delta.norm()) for delta in level.delta.values()) for level in levels]
    assert moved["half"][0] == pytest.approx(moved["all"][0] / 2) and moved["all"][0] > 0
    assert moved["two"][0] > 0 and moved["two"][1] == 0  # the slow level, and the fast one that starts again


def test_both_kinds_of_two_levels_have_equal_rates_and_half_lives_per_token():
    for a, b in zip(ARMS["two levels, one period"][1], ARMS["slow level"][1], strict=True):
        periods = recipe.SLOW / recipe.PERIOD
        assert a.rates[0] == b.rates[0] and a.rates[1] * periods == b.rates[1]
        assert 1 - (1 - a.decays[1]) ** periods == pytest.approx(b.decays[1], rel=1e-4)
    assert len({len(settings) for _, settings in ARMS.values()}) == 1


def test_the_best_setting_forgets_less_than_the_limit():
    points = [{"gain": [g], "forgetting": [f]} for g, f in ((5, 0.1), (7, 0.9), (9, 1.1))]
    assert recipe.best(points) == points[1]
    with pytest.raises(ValueError, match="add smaller rates"):
        recipe.best(points[2:])


def test_gains_are_compared_at_equal_forgetting():
    weak, strong = {"gain": [10, 20], "forgetting": [0, 1]}, {"gain": [20, 22], "forgetting": [1, 3]}
    last = {"gain": [30, 23], "forgetting": [2, 4]}
    assert recipe.gains_at([weak, strong, last], [1.5, 2]) == [25, 21]
    with pytest.raises(ValueError, match="stream 1: forgetting 5"):
        recipe.gains_at([weak, strong], [0.5, 5])


def test_a_report_from_texts_to_table(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "ARMS", {name: (periods, sets[:1]) for name, (periods, sets) in ARMS.items()})
    monkeypatch.setattr(recipe, "VALIDATION", (STREAM,))
    monkeypatch.setattr(recipe, "TEST", (STREAM, ("novel", "bible_x", "wiki", 0.2, 0.3)))
    monkeypatch.setattr(recipe, "asked_stories", lambda: torch.randint(3, 512, (2, 12)))
    monkeypatch.setattr(recipe, "LIMIT", 100.0)
    monkeypatch.setattr(recipe, "STRONGER", {})
    path = recipe.report(small)
    assert path.parent == recipe.Path("results/slow_levels")
    lines = recipe.page(newest("slow_levels")).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {arm}" for arm in ARMS]
    recipe.draw(newest("slow_levels"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
