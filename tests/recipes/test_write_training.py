"""The recipe of training through the writes: its text, what is trained, and how a setting is chosen."""

import lzma

import pytest
import torch

from tests.hf.needs import need

need("transformers")

from nestling.memories.continuum import continuum_levels  # noqa: E402
from recipes import write_training as recipe  # noqa: E402
from recipes.write_training_gaps import at, difference  # noqa: E402


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of made-up texts, and sizes that take no time."""
    for name, value in {"PERIODS": (8, 16, 32), "STEPS": 2, "NOVEL": 48, "STORIES": 16, "CHUNK": 300}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "NOVELS", ("one", "two"))
    monkeypatch.setattr("nestling.hf.own_text.own_text", lambda model, seed: torch.randint(3, 512, (2, 24)))
    (tmp_path / "lm" / "gutenberg").mkdir(parents=True)
    for name in recipe.NOVELS:
        (tmp_path / "lm" / "gutenberg" / f"{name}.txt.xz").write_bytes(
            lzma.compress((f"{name} is a word. " * 99).encode())
        )
    known = lzma.decompress((recipe.DATA / "stories_40.txt.xz").read_bytes())
    sample = known + b"\nA cat sat.\nA dog ran far away.\n"
    (tmp_path / "lm" / "tinystories_sample.txt.xz").write_bytes(lzma.compress(sample))
    return str(tmp_path)


def test_the_stream_is_novels_and_stories_that_are_not_asked_about(small):
    from nestling.hf.llama2c import read_tokenizer

    first, again, other = (recipe.stream(seed, small) for seed in (0, 0, 1))
    pieces = [next(first) for _ in range(4)]
    assert all(torch.equal(a, next(again)) for a in pieces)
    assert not all(torch.equal(a, next(other)) for a in pieces)
    decode = read_tokenizer(recipe.DATA / "tok512.bin.xz").decode
    for piece in pieces:
        assert len(piece) == 64 and piece[0] == piece[48] == 1
        assert "is a word" in decode(piece[:48].tolist())
        whole = decode(piece[48:].tolist()).split()[:-1]  # the last word may be cut
        assert set(whole) <= {"A", "cat", "sat.", "dog", "ran", "far", "away."}
    with pytest.raises(AssertionError):
        recipe.training_stories("none of the stories that are asked about")


@pytest.mark.parametrize("name", recipe.TRAININGS)
def test_a_training_changes_what_it_says(small, name):
    wanted = recipe.TRAININGS[name]
    model = recipe.converted(0, exact=wanted.exact)
    before = {n: p.clone() for n, p in model.named_parameters()}
    recipe.train(model, wanted, (0.1, 1e-3), 0, small)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    rates = {f"{path}.inner_log_rate" for path in continuum_levels(model)}
    states = {n for n in before if ".mlp.body." in n}
    assert len(rates) == 5 and len(states) == 15
    assert moved == (rates if wanted.rates else set()) | (states if wanted.states else set())


def test_a_training_is_compared_on_the_line_of_its_control():
    points = [(1.0, 4.0), (0.9, 3.0), (1.2, 2.7), (2.0, 2.6)]
    assert at(points, 1.05) == pytest.approx(2.85)
    assert at(points, 0.95) == pytest.approx(2.95)  # the line passes twice
    assert at(points, 0.8) is None and at(points, 3.0) is None


def test_differences_are_paired_and_against_the_right_reader():
    def reader(read, after):
        each = [{"read": read + s, "stories after": after, "frozen": 4.0, "stories": 1.0} for s in (0.0, 0.1, 0.3)]
        return {"1": dict.fromkeys(recipe.TESTS, each)}

    readers = {recipe.UNTRAINED: reader(3.0, 1.1), recipe.CONTROL: reader(2.9, 1.2), recipe.BOTH: reader(2.7, 1.1)}
    gap = difference(readers, recipe.BOTH, recipe.CONTROL)
    assert gap["worth"]["mean"] == pytest.approx(-0.2 - 1.0) and gap["read"]["mean"] == pytest.approx(-0.2)
    assert gap["stories after"]["verdict"] == "better"
    assert gap["at equal stories"]["mean"] == pytest.approx(-0.75 + 0.4 / 6)
    readers[recipe.RATES] = reader(2.95, 1.5)
    assert difference(readers, recipe.RATES, recipe.UNTRAINED)["at equal stories"] is None  # beyond the line
    assert difference(readers, recipe.UNTRAINED, recipe.RATES)["at equal stories"] is None  # there is no line
