"""BABILong: stories as bAbI writes them, facts in order in a book, exact lengths, answers and scores."""

import io
import re
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.data import ByteTokenizer
from nestling.data.bundled import bundled_text
from nestling.evals.babilong import (
    BABILongTask,
    Question,
    Story,
    asked_logits,
    babilong_score,
    parse_stories,
    read_stories,
)
from nestling.evals.suite import NOTHING
from nestling.models import Output, State
from tests.evals.small_models import VOCAB, model

BYTES = ByteTokenizer()
EMMA = bundled_text("emma")[:20_000].encode("ascii", "ignore").decode()  # a byte per character
TEXT = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went back to the garden.
5 John took the milk.
6 Where is Mary? \tgarden\t4
1 The office is east of the hallway.
2 What is the hallway west of?\toffice\t1
"""
STORIES = [
    Story(
        facts=(
            "Mary moved to the bathroom.",
            "John went to the hallway.",
            "Mary went back to the garden.",
            "John took the milk.",
        ),
        questions=(Question("Where is Mary?", "bathroom", 2), Question("Where is Mary?", "garden", 4)),
    ),
    Story(("The office is east of the hallway.",), (Question("What is the hallway west of?", "office", 1),)),
]


def task() -> BABILongTask:
    return BABILongTask("qa1", STORIES, BYTES, EMMA)


def pack(folder: Path, *names: str) -> None:
    """An archive of bAbI with these files, all of them TEXT."""
    with tarfile.open(folder / "babi.tar.xz", "w:xz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(TEXT)
            tar.addfile(entry, io.BytesIO(TEXT.encode()))


def test_stories_are_read_as_bAbI_writes_them(tmp_path: Path) -> None:
    assert parse_stories(TEXT) == STORIES
    pack(tmp_path, "en-10k/qa1_single-supporting-fact_train.txt", "en/qa3_three-supporting-facts_train.txt")
    assert read_stories(tmp_path / "babi.tar.xz", "qa1", "train") == STORIES
    assert read_stories(tmp_path / "babi.tar.xz", "qa3", "train") == STORIES  # which has no 10k training set
    with pytest.raises(ValueError, match="name='qa6' is no task of BABILong; use one of qa1, qa2, qa3, qa4, qa5"):
        read_stories(tmp_path / "babi.tar.xz", "qa6", "train")


def said(row: Tensor, targets: Tensor) -> tuple[str, tuple[str, ...]]:
    """The text of a row, and its asked pieces; each of these is what comes next."""
    text, asked = BYTES.decode(row.tolist()).rstrip("\0"), list[str]()
    for t in (targets != NOTHING).nonzero()[:, 0].tolist():
        assert targets[t] == row[t + 1]
        asked = [*asked, ""] if targets[t - 1] == NOTHING else asked
        asked[-1] += chr(int(targets[t]))
    return text, tuple(asked)


def test_length_zero_is_the_story_alone() -> None:
    made = task().examples(3, (0, 0), seed=0)
    found = {said(row, targets) for row, targets in zip(made.tokens, made.targets, strict=True)}
    first, both, relation = (
        " Mary moved to the bathroom. John went to the hallway. Where is Mary? bathroom",
        " Mary moved to the bathroom. John went to the hallway. Mary went back to the garden. John took the milk."
        " Where is Mary? garden",
        " The office is east of the hallway. What is the hallway west of? office",
    )
    assert found == {(first, (" bathroom",)), (both, (" garden",)), (relation, (" office",))}


def test_facts_stand_in_order_between_the_sentences_of_the_book() -> None:
    book, places = " ".join(EMMA.split()), []
    made = task().examples(24, (900, 1000), seed=1)
    for row, targets in zip(made.tokens, made.targets, strict=True):
        text, asked = said(row, targets)
        assert 900 <= len(text) <= 1000 and len(asked) == 1 and text.endswith(asked[0])
        story, question = next((s, q) for s in STORIES for q in s.questions if text.endswith(f"{q.text} {q.answer}"))
        begins = [text.index(f" {fact}") for fact in story.facts[: question.facts]]
        assert begins == sorted(begins) and not any(fact in text for fact in story.facts[question.facts :])
        places += [begin / len(text) for begin in begins]
        hay = text.removesuffix(f" {question.text} {question.answer}")
        for fact in story.facts[: question.facts]:
            hay = hay.replace(f" {fact}", "")
        assert hay in f" {book} {book}"
    assert min(places) < 0.2 and max(places) > 0.7


def test_a_lesson_asks_every_question_where_the_story_does() -> None:
    made = task().lessons(12, (700, 700), seed=0)
    for row, targets in zip(made.tokens, made.targets, strict=True):
        text, asked = said(row, targets)
        assert len(text) == 700
        if "Mary moved" in text:
            assert asked == (" bathroom", " garden")
            order = ["John went to", "Where is Mary? bathroom", "Mary went back", "John took", "Where is Mary? garden"]
            assert [m.group() for m in re.finditer("|".join(map(re.escape, order)), text)] == order


def test_lengths_that_do_not_hold_the_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="length=20 of qa1 is shorter than its facts; use 0 or at least"):
        task().examples(1, (20, 20), seed=0)
    with pytest.raises(ValueError, match="fewer than two sentences"):
        BABILongTask("qa1", STORIES, BYTES, "no end")


def test_chance_is_the_commonest_answer() -> None:
    assert BABILongTask("qa1", [STORIES[0], STORIES[0], STORIES[1]], BYTES, EMMA).chance == 2 / 5


def peeking(wrong: int, strength: float = 50.0):
    """A model that knows the next token of a row, but errs at position `wrong` from the end."""

    def model(tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        said = tokens.roll(-1, 1)
        said[:, -wrong] += 1
        return Output(strength * F.one_hot(said, 256).float(), state)  # type: ignore[arg-type]

    return model


def test_scores_count_examples_and_bits() -> None:
    perfect = babilong_score(peeking(wrong=1), task(), 3, (300, 300), seed=0, rows=2, piece=300)
    assert (perfect.n, perfect.exact, perfect.right) == (3, 3, perfect.asked) and perfect.bits < 1e-6
    slip = babilong_score(peeking(wrong=2), task(), 3, (300, 300), seed=0, rows=2, piece=300)
    assert (slip.exact, slip.right) == (0, slip.asked - 3)
    vague = babilong_score(peeking(wrong=1, strength=0.0), task(), 2, (300, 300), seed=0, piece=300)
    assert vague.bits == pytest.approx(8 * vague.asked / 2) and "bits per answer" in vague.columns()


def test_reading_in_pieces_gives_the_logits_of_the_whole() -> None:
    made = task().examples(4, (0, 0), seed=0)
    small = made.__class__(made.tokens % VOCAB, torch.where(made.targets == NOTHING, NOTHING, made.targets % VOCAB))
    reader = model("hope")
    whole, pieces = (asked_logits(reader, small, learn=False, piece=piece) for piece in (1000, 17))
    assert whole.shape == (int((small.targets != NOTHING).sum()), VOCAB)
    torch.testing.assert_close(whole, pieces, rtol=1e-9, atol=1e-9)


def test_seeds_repeat() -> None:
    one, same, other = (task().examples(2, (500, 500), seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens) and not torch.equal(one.tokens, other.tokens)
