"""Needles: what is asked is found again in the text with a regular expression; lengths, marks, scores."""

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.data import ByteTokenizer
from nestling.data.bundled import bundled_text
from nestling.evals.needles import NEEDLES, NeedleTask, needle_score, whole_values
from nestling.evals.suite import NOTHING
from nestling.models import Output, State

BYTES = ByteTokenizer()
EMMA = bundled_text("emma")[:20_000].encode("ascii", "ignore").decode()  # a byte per character
VALUE = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}|\d{7}"


def texts(name: str, lengths: tuple[int, int] = (1800, 2000)) -> list[tuple[str, list[str]]]:
    """Whole text of each example, and its asked pieces in order."""
    made = NeedleTask(NEEDLES[name], BYTES, EMMA).examples(12, lengths, seed=0)
    out = []
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        text, asked = BYTES.decode(tokens.tolist()).rstrip("\0"), []
        for t in (targets != NOTHING).nonzero()[:, 0].tolist():
            assert targets[t] == tokens[t + 1]
            asked = [*asked, ""] if not t or targets[t - 1] == NOTHING else asked
            asked[-1] += chr(int(targets[t]))
        assert lengths[0] <= len(text) <= lengths[1]
        out.append((text, asked))
    return out


@pytest.mark.parametrize("name", NEEDLES)
def test_the_answer_is_what_the_text_says(name: str) -> None:
    needle, places = NEEDLES[name], []
    for text, asked in texts(name):
        body, _, asking = text.rpartition("What ")
        facts = re.findall(rf"One of the special magic \w+ for ([a-z]+ [a-z]+) is: ({VALUE})\. ", body)
        assert len(facts) == needle.keys * needle.values and len({key for key, _ in facts}) == needle.keys
        keys = re.split(r", and |, ", re.search(r"for ([a-z, ]+) mentioned", asking)[1])  # type: ignore[index]
        assert len(keys) == needle.asked
        expected = [f" {value}" for key in keys for shown, value in facts if shown == key]
        assert asked == expected and text.endswith(",".join(expected))
        assert all(len(value.strip()) == (36 if needle.uuids else 7) for value in expected)
        places += [fact.start() / len(body) for fact in re.finditer("One of the special", body)]
    assert min(places) < 0.2 and max(places) > 0.8


def test_the_rest_of_the_text_is_the_book_or_the_same_five_sentences() -> None:
    book = " ".join(EMMA.split())
    for name in ("s-niah-1", "s-niah-2"):
        for text, _ in texts(name):
            hay = re.sub(rf"One of the special magic \w+ for [a-z ]+ is: ({VALUE})\. ", "", text)
            hay = hay[hay.index("afterwards. ") + 12 : hay.index("What is the special")]
            where = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 40
            assert hay in (where if name == "s-niah-1" else f"{book} {book} ")


def test_lengths_that_hold_no_question_are_refused() -> None:
    task = NeedleTask(NEEDLES["multi-value"], BYTES, EMMA)
    with pytest.raises(ValueError, match="length=300 of multi-value is shorter than its question"):
        task.examples(1, (300, 300), seed=0)
    with pytest.raises(ValueError, match="fewer than two sentences"):
        NeedleTask(NEEDLES["s-niah-2"], BYTES, "no end")


def peeking(wrong: int, strength: float = 50.0):
    """A model that knows the next token but errs at position `wrong` from the end."""

    def model(tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        said = tokens.roll(-1, 1)
        said[:, -wrong] += 1
        return Output(strength * F.one_hot(said, 256).float(), state)  # type: ignore[arg-type]

    return model


def test_scores_count_values_examples_and_bits() -> None:
    task = NeedleTask(NEEDLES["multi-value"], BYTES, EMMA)
    perfect = needle_score(peeking(wrong=1), task, 3, (800, 800), seed=0)
    assert (perfect.values, perfect.values_right, perfect.exact, perfect.asked) == (
        12,
        12,
        3,
        96,
    ) and perfect.bits < 1e-6
    slip = needle_score(peeking(wrong=2), task, 3, (800, 800), seed=0, rows=2)
    assert (slip.values_right, slip.exact, slip.right) == (9, 0, 93) and slip.value_share == 0.75
    assert slip.columns()["values right, %"] == "75.0" and slip.to_dict()["value_share"] == 0.75
    vague = needle_score(peeking(wrong=1, strength=0.0), task, 2, (800, 800), seed=0)
    assert vague.bits == pytest.approx(math.log2(256), rel=1e-6)


def test_runs_of_asked_positions_are_values() -> None:
    asked = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    right = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    assert whole_values(asked, right) == (4, 3)


def test_seeds_repeat() -> None:
    task = NeedleTask(NEEDLES["multi-query"], BYTES, EMMA)
    one, same, other = (task.examples(2, (900, 900), seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens) and not torch.equal(one.tokens, other.tokens)
