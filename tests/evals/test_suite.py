"""Scores: what is counted, that rows read side by side change nothing, and the table."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.evals.formal_languages import LANGUAGES
from nestling.evals.suite import NOTHING, Score, answers, score, table
from nestling.models import Output, State, build


@dataclass
class Says:
    """A model that is sure of `given(tokens)` at every position."""

    given: object
    asked_to_learn: bool = False

    def __call__(self, tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        self.asked_to_learn |= learn
        return Output(F.one_hot(self.given(tokens), 7).float(), state)  # type: ignore[operator, arg-type]


def parity(tokens: Tensor) -> Tensor:
    return 1 - tokens.cumsum(1) % 2


def test_a_model_that_knows_is_always_right_and_one_that_never_changes_its_mind_is_not() -> None:
    language = LANGUAGES["parity"]
    knows = score(Says(parity), language, 50, (1, 40), seed=0, rows=7)
    assert knows.accuracy == knows.exact_share == 1 and knows.n == 50
    examples = language.examples(50, (1, 40), seed=0)
    asked = examples.targets != NOTHING
    stubborn = score(Says(torch.zeros_like), language, 50, (1, 40), seed=0)
    odd = (examples.targets == 0).sum().item()
    assert (stubborn.right, stubborn.asked) == (odd, int(asked.sum()))
    assert stubborn.exact == sum(bool((t[t != NOTHING] == 0).all()) for t in examples.targets)


def test_one_wrong_position_costs_the_whole_example() -> None:
    def slip(tokens: Tensor) -> Tensor:
        made = parity(tokens)
        made[:, 30] = 1 - made[:, 30]
        return made

    made = score(Says(slip), LANGUAGES["parity"], 40, (1, 60), seed=5)
    longer = int((LANGUAGES["parity"].examples(40, (1, 60), seed=5).targets[:, 30] != NOTHING).sum())
    assert 0 < longer < 40 and made.exact == 40 - longer and made.right == made.asked - longer


def test_classes_beyond_the_task_are_no_answers() -> None:
    logits = torch.tensor([[[0.0, 1.0, 9.0]]])

    def model(tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        return Output(logits, state)  # type: ignore[arg-type]

    assert answers(model, torch.zeros(1, 1, dtype=torch.long), classes=2).item() == 1


def test_levels_write_only_when_asked() -> None:
    for learn in (False, True):
        model = Says(parity)
        score(model, LANGUAGES["parity"], 2, (1, 4), seed=0, learn=learn)
        assert model.asked_to_learn == learn


def test_a_library_model_is_scored_and_the_rows_side_by_side_do_not_matter() -> None:
    language = LANGUAGES["shuffle-2"]
    model = build("hope", vocab_size=language.vocab_size, dim=8, depth=1, heads=1, chunk_size=4, inner_lr=0.0)
    one, many = (score(model, language, 12, (2, 20), seed=0, rows=rows) for rows in (1, 12))
    assert one == many and 0 <= one.accuracy <= 1


def test_a_table_has_a_row_per_score() -> None:
    made = Score(task="x", version=2, seed=1, shortest=1, longest=40, n=8, asked=1000, right=995, exact=6)
    assert made.to_dict()["exact_share"] == 0.75
    title, rule, *lines = table([made, made]).splitlines()
    assert title == "| task | tokens | examples right, % | positions right, % | n | positions | seed | version |"
    assert rule == "|" + " --- |" * 8 and lines == ["| x | 1-40 | 75.0 | 99.50 | 8 | 1,000 | 1 | 2 |"] * 2


@pytest.mark.parametrize("lengths, message", [((3, 3), "no string of that length"), ((5, 2), "no string")])
def test_lengths_that_cannot_be_are_named(lengths: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LANGUAGES["(abab)*"].examples(1, lengths, seed=0)
