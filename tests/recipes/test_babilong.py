"""The recipe of BABILong: equal parameters, every parameter learns, the stream asks what the text tells, the tables."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.data import ByteTokenizer
from nestling.data.bundled import bundled_text
from nestling.evals import BABILongTask, Question, Story
from nestling.models import Output
from nestling.models.presets import config_of, count
from recipes.babilong import MODELS, RATES, SHAPE, answer_loss, chosen_rate, differences, make
from recipes.babilong_figures import at_the_end, by_distance, draw, page, peaks, tokens
from recipes.babilong_stream import Seen, known, read, told

BYTES = ByteTokenizer()
STORY = Story(
    ("Mary moved to the bathroom.", "John went to the hallway.", "Mary went back to the garden."),
    (Question("Where is Mary?", "garden", 3),),
)
TASK = BABILongTask("qa1", [STORY], BYTES, bundled_text("emma")[:9_000].encode("ascii", "ignore").decode())


@pytest.mark.parametrize("name", MODELS)
def test_models_have_equal_parameters_and_all_of_them_learn(name: str) -> None:
    model = make(name)
    assert abs(model.num_parameters() / count(config_of("transformer", **SHAPE)) - 1) < 0.02
    answer_loss(model, TASK.lessons(2, (0, 0), seed=0)).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert not still


def test_hope_of_the_table_has_no_silu_before_its_memories_and_forgets_slowly() -> None:
    mixers = [block.mixer for block in make("hope").blocks]
    assert [(m.memory, m.conv.activation, m.conv.width) for m in mixers] == [("linear", False, 4)] * 2
    assert mixers[0].half_lives()["memory"] == pytest.approx(1e6, rel=0.05)  # float32 logits near 1


def test_what_a_text_tells_and_what_is_known_when() -> None:
    text, seen = told(TASK, STORY, 3_000, random.Random(0))
    said = BYTES.decode(text.tolist())
    assert len(text) == 3_000 and [(s.who, s.where) for s in seen] == [
        ("Mary", "bathroom"), ("John", "hallway"), ("Mary", "garden")
    ]  # fmt: skip
    for fact, known_then in zip(STORY.facts, seen, strict=True):
        assert said[: known_then.at].endswith(f" {fact}")
    facts = [Seen(10, "Mary", "bathroom"), Seen(20, "John", "hallway"), Seen(30, "Mary", "garden")]
    assert [sorted((f.who, f.where) for f in known(facts, now)) for now in (9, 10, 29, 30)] == [
        [], [("Mary", "bathroom")], [("John", "hallway"), ("Mary", "bathroom")],
        [("John", "hallway"), ("Mary", "garden")],
    ]  # fmt: skip


@dataclass(frozen=True)
class Heard:
    """A state that is all that was read."""

    texts: tuple[str, ...]
    nbytes: int = 0

    def select(self, rows: list[int]) -> "Heard":
        return Heard(tuple(self.texts[row] for row in rows))


def listener(tokens: Tensor, state: Heard | None = None, learn: bool = True) -> Output:
    """Answers from the whole text, except about John."""
    before = state.texts if state is not None else ("",) * len(tokens)
    texts = tuple(old + BYTES.decode(row.tolist()) for old, row in zip(before, tokens, strict=True))
    logits = torch.zeros(*tokens.shape, 256)
    for row, text in enumerate(texts):
        assert text.count("Where is") <= 1  # the stream never hears of an earlier question
        if asked := re.search(r" Where is (\w+)\?$", text):
            places = re.findall(rf" {asked[1]} [a-z ]* the (\w+)\.", text)
            answer = " " if asked[1] == "Mary" and places else "?"
            logits[row, -1] = F.one_hot(torch.tensor(ord(answer)), 256)
    return Output(logits, Heard(texts))  # type: ignore[arg-type]


def test_the_stream_is_asked_from_copies_about_everybody_seen_so_far() -> None:
    made = [told(TASK, STORY, 2_048, random.Random(seed)) for seed in (0, 1)]
    texts, seen = torch.from_numpy(np.stack([text for text, _ in made])), [s for _, s in made]
    found = read(listener, texts, seen, TASK, points=8)  # type: ignore[arg-type]
    assert [m["tokens"] for m in found["memory"]] == [256 * i for i in range(1, 9)]
    expected = [
        [now, now - fact.at, int(fact.who == "Mary")]
        for now in range(256, 2_049, 256)
        for facts in seen
        for fact in known(facts, now)
    ]
    assert found["asked"] == expected and {right for _, _, right in expected} == {0, 1}


def result() -> dict:
    cells = [{"accuracy": a, "n": 8, "cpu_seconds": 30.0} for a in (0.75, 1.0, 0.875)]
    low = [{"accuracy": a - 0.5, "n": 8, "cpu_seconds": 30.0} for a in (0.75, 1.0, 0.875)]
    tests = {"hope": {"0": cells, "4096": cells}, "transformer": {"0": low}}
    asked = [[2**20, 100, 1], [2**20, 20_000, 0], [2**19, 20_000, 1], [2**20, 2**20, 0]]
    memory = [{"tokens": 2**18 * i, "peak_bytes": 2**20 * (100 + i), "state_bytes": 1} for i in range(1, 5)]
    metrics = {"chance": 0.2, "chosen rate": dict.fromkeys(tests, 0.005), "tests": tests}
    metrics |= {"against hope": differences(tests), "streams": {"hope": [{"asked": asked, "memory": memory}]}}
    return {"metrics": metrics}


def test_the_page_shows_means_intervals_verdicts_and_the_stream(tmp_path: Path) -> None:
    made = page(result())
    assert "| model | rate | 0 | 4K |" in made and "| hope | 0.005 | 88 [56, 100] | 88 [56, 100] |" in made
    assert "| questions | | 24 | 24 |" in made and "| transformer | +50 [50, 50] **better** |  |" in made
    assert "| right, % (questions) | 100 (1) | 50 (2) |  |  | 0 (1) | 33 (3) |" in made
    assert "101 / 102 / 104; whole against a quarter at most 1.030" in made and "CPU time: 4 minutes" in made
    draw(result(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_parts_of_the_table() -> None:
    stream = result()["metrics"]["streams"]["hope"]
    assert by_distance(stream) == [(16_384, 1, 1), (65_536, 1, 2), (262_144, 0, 0), (524_288, 0, 0), (2**20, 0, 1)]
    assert at_the_end(stream) == (1, 3) and peaks(stream[0]) == [101, 102, 104]
    assert [tokens(t) for t in ("0", 1024, 65_536, 2**20)] == ["0", "1K", "64K", "1M"]
    bits = {f"{lr:g}": {"bits": b} for lr, b in zip(RATES, (0.5, 0.2, 0.2), strict=True)}
    assert chosen_rate(bits) == RATES[1]
