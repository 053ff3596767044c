"""Every asked token of MAD's six tasks against a plain reading of the sequence."""

from dataclasses import replace

import pytest
import torch

from nestling.evals.mad import MAD, MADTask
from nestling.evals.suite import NOTHING

ROWS = 60


def made(name: str, *, training: bool = False, seed: int = 0) -> list[tuple[list[int], dict[int, int]]]:
    """Tokens, and the asked position -> class, of each row."""
    task = replace(MAD[name], training=training)
    examples = task.examples(ROWS, (task.length, task.length), seed)
    assert int(examples.tokens.min()) >= 0 and int(examples.tokens.max()) < task.vocab_size
    rows = zip(examples.tokens.tolist(), examples.targets.tolist(), strict=True)
    return [(tokens, {t: c for t, c in enumerate(targets) if c != NOTHING}) for tokens, targets in rows]


@pytest.mark.parametrize("name", ["in-context-recall", "noisy-in-context-recall"])
def test_recall_asks_for_the_value_of_every_key_seen_before(name: str) -> None:
    noisy = 0
    for tokens, asked in made(name):
        assert len(tokens) == 127
        known: dict[int, int] = {}
        expected = {}
        for t in range(0, 127, 2):
            if tokens[t] >= 16:
                noisy += 1
                assert t + 1 < 127 and tokens[t + 1] >= 16
                continue
            assert tokens[t] < 8
            if tokens[t] in known:
                expected[t] = known[tokens[t]]
            if t + 1 < 127:
                assert 8 <= tokens[t + 1] < 16 and known.setdefault(tokens[t], tokens[t + 1]) == tokens[t + 1]
        assert asked == expected and 126 in asked
    share = noisy / (ROWS * 63)
    assert share == 0 if name == "in-context-recall" else 0.17 < share < 0.23


def parsed(tokens: list[int], half: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Pairs (key, value, place of the first value token): a key is a run below `half`, a value one at or above."""
    pairs, t = [], 0
    while t < len(tokens):
        begin = t
        while t < len(tokens) and tokens[t] < half:
            t += 1
        middle = t
        while t < len(tokens) and tokens[t] >= half:
            t += 1
        pairs.append((tuple(tokens[begin:middle]), tuple(tokens[middle:t]), middle))
    return pairs


def test_fuzzy_recall_asks_for_every_token_of_the_value_of_a_motif_seen_before() -> None:
    task = MAD["fuzzy-in-context-recall"]
    keys, values, places = set(), set(), []
    for tokens, asked in made(task.name):
        assert len(tokens) == 128
        whole = [*tokens, asked[127]]  # the last token is only asked
        text = whole[next(i for i, token in enumerate(whole) if token != 15) :]
        offset = len(whole) - len(text)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = {}
        pairs = parsed(text, 7)
        for key, value, place in pairs:
            assert len(set(key)) == len(key) == 3 and 1 <= len(set(value)) == len(value) <= 3
            if key in known:
                assert known[key] == value
                expected |= {offset + place + i - 1: token for i, token in enumerate(value)}
            known[key] = value
            keys |= set(key)
            values |= set(value)
        assert asked == expected and pairs[-1][0] in [key for key, _, _ in pairs[:-1]]
        places.append([key for key, _, _ in pairs].index(pairs[-1][0]) / len(pairs))
    assert keys == set(range(7)) and values == set(range(7, 15))
    assert min(places) < 0.2 and max(places) > 0.8  # the pair asked for stands anywhere


def test_fuzzy_recall_trains_on_keys_of_every_size() -> None:
    sizes = set()
    for tokens, asked in made("fuzzy-in-context-recall", training=True):
        assert [asked[t] for t in range(127)] == tokens[1:]
        text = tokens[next(i for i, token in enumerate(tokens) if token != 15) :]
        sizes |= {len(key) for key, _, _ in parsed(text, 7)[:-1]}
    assert sizes == {1, 2, 3}


def test_selective_copying_asks_for_the_symbols_in_order() -> None:
    first = set()
    for tokens, asked in made("selective-copying"):
        copy = tokens.index(15)
        symbols = [token for token in tokens[:copy] if token != 14]
        assert (len(tokens), copy, tokens[copy + 1 :]) == (256, 239, [14] * 16)
        assert asked == dict(enumerate(symbols, copy + 1)) and len(symbols) == 16
        assert tokens[copy - 1] == symbols[-1]  # as in the authors' generator, no blank stands after the last
        first.add(next(i for i, token in enumerate(tokens) if token != 14))
    assert len(first) > 10


def test_compression_and_memorization() -> None:
    for tokens, asked in made("compression"):
        assert len(tokens) == 32 and tokens[-1] == 15 and max(tokens[:-1]) < 15 and asked == dict(enumerate(tokens))
    maps: dict[int, int] = {}
    for seed in (0, 1):
        for tokens, asked in made("memorization", seed=seed):
            assert tokens[1::2] == [255] * 16 and set(asked) == set(range(1, 32, 2))
            for t, value in asked.items():
                assert maps.setdefault(tokens[t - 1], value) == value and 127 <= value < 255
    assert len(maps) == len(set(maps.values())) == 127


@pytest.mark.parametrize("task", MAD.values(), ids=MAD)
def test_seeds_settings_and_errors(task: MADTask) -> None:
    lengths = (task.length, task.length)
    one, same, other = (task.examples(3, lengths, seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens) and torch.equal(one.targets, same.targets)
    assert not torch.equal(one.tokens, other.tokens)
    with pytest.raises(ValueError, match=f"length=1 of {task.name}"):
        task.examples(1, (1, 1), seed=0)
    assert len(MAD) == 6
