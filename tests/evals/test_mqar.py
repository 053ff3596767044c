"""Every asked value is found again by reading the pairs; queries once each; gaps by the power law."""

import pytest
import torch

from nestling.evals.mqar import BASED_TEST, BASED_TRAIN, MQAR, ZOOLOGY
from nestling.evals.suite import NOTHING


@pytest.mark.parametrize("task, length", [(MQAR(pairs=4, vocab_size=64), 32), (MQAR(pairs=8, vocab_size=20), 32)])
def test_each_key_is_asked_once_and_for_its_value(task: MQAR, length: int) -> None:
    made = task.examples(100, (length, length), seed=0)
    for tokens, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        pairs = dict(zip(tokens[: 2 * task.pairs : 2], tokens[1 : 2 * task.pairs : 2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == task.pairs
        assert all(1 <= key < task.vocab_size // 2 <= value < task.vocab_size for key, value in pairs.items())
        asked = {t: target for t, target in enumerate(targets) if target != NOTHING}
        assert all(t >= 2 * task.pairs and t % 2 == 0 for t in asked)
        assert {tokens[t]: value for t, value in asked.items()} == pairs and len(asked) == task.pairs


def test_what_is_no_pair_and_no_query_is_zero_or_anything() -> None:
    for random_rest in (False, True):
        task = MQAR(pairs=2, vocab_size=10, random_rest=random_rest)
        made = task.examples(300, (40, 40), seed=0)
        rest = made.tokens[:, 4:][made.targets[:, 4:] == NOTHING]
        assert set(rest.tolist()) == (set(range(10)) if random_rest else {0})


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power: float) -> None:
    made = MQAR(pairs=1, vocab_size=16, power=power).examples(4000, (22, 22), seed=0)
    gap = (made.targets != NOTHING).long().argmax(1).sub(2).div(2, rounding_mode="floor")
    found = torch.bincount(gap, minlength=10) / 4000
    law = torch.arange(1, 11, dtype=torch.float64) ** (power - 1)
    law /= law.sum()
    assert ((found - law).abs() < 4 * (law * (1 - law) / 4000).sqrt()).all()


def test_seeds_and_settings() -> None:
    task, length = MQAR(pairs=3, vocab_size=32), (12, 12)
    assert torch.equal(task.examples(5, length, 1).tokens, task.examples(5, length, 1).tokens)
    assert not torch.equal(task.examples(5, length, 1).tokens, task.examples(5, length, 2).tokens)
    for task, tokens, _ in (*ZOOLOGY, *BASED_TRAIN, *BASED_TEST):
        assert len(task.examples(1, (tokens, tokens), seed=0)) == 1 and task.vocab_size == 8192


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="pairs=8"):
        MQAR(pairs=8, vocab_size=16)
    with pytest.raises(ValueError, match="power=0"):
        MQAR(power=0)
    with pytest.raises(ValueError, match="at least 4 tokens per pair"):
        MQAR(pairs=8).examples(1, (30, 30), seed=0)
    with pytest.raises(ValueError, match="one length"):
        MQAR(pairs=8).examples(1, (30, 64), seed=0)
