"""Corpora in another order and in proportion: every document whole, every border marked, one ring."""

import numpy as np
import pytest
import torch

from nestling.data import ByteTokenizer, TokenStream, mixture, shuffled, tokenize
from nestling.data.blocks import blocks_of
from nestling.data.tokens import Tokens


def corpus(letter: str, sizes: list[int]) -> Tokens:
    return tokenize([letter * size for size in sizes], ByteTokenizer())


def documents(ring) -> list[str]:
    """What the ring holds, cut at its borders."""
    ids, starts = ring.take(0, len(ring)), ring.document_starts(0, len(ring))
    return [ByteTokenizer().decode(part) for part in np.split(ids, np.flatnonzero(starts)) if len(part)]


def test_blocks_hold_whole_documents() -> None:
    tokens = corpus("a", [5, 3, 9, 1, 1, 4])
    assert [part.tolist() for part in blocks_of(tokens, 6)] == [[0, 8, 17], [8, 9, 6]]
    assert blocks_of(tokens, 1)[1].tolist() == [5, 3, 9, 1, 1, 4] and blocks_of(tokens, 100)[1].tolist() == [23]


def test_shuffled_is_the_same_documents_in_another_order() -> None:
    tokens = tokenize([chr(97 + i) * (1 + i % 5) for i in range(26)], ByteTokenizer())
    ring, other = shuffled(tokens, block=1, seed=1), shuffled(tokens, block=1, seed=2)
    assert sorted(documents(ring)) == documents(tokens) != documents(ring) != documents(other)
    assert len(ring) == len(tokens) and ring.fingerprint != other.fingerprint
    assert ring.fingerprint == shuffled(tokens, block=1, seed=1).fingerprint


def test_a_ring_is_read_from_anywhere() -> None:
    ring = shuffled(corpus("ab", [3, 7, 2, 9, 4]), block=4, seed=0)
    ids, starts = ring.take(0, len(ring)), ring.document_starts(0, len(ring))
    for start in range(len(ring) + 3):
        for length in (0, 1, 5, len(ring) + 2):
            at = (start + np.arange(length)) % len(ring)
            assert np.array_equal(ring.take(start, length), ids[at])
            assert np.array_equal(ring.document_starts(start, length), starts[at])


def test_a_mixture_has_its_proportions_everywhere() -> None:
    ring = mixture({"a": (corpus("a", [10] * 40), 3.0), "b": (corpus("b", [10] * 7), 1.0)}, block=10)
    text = ByteTokenizer().decode(ring.take(0, len(ring)))
    assert all(10 <= text[at : at + 80].count("b") <= 30 for at in range(0, len(text) - 80, 10))
    assert text.count("a") == pytest.approx(0.75 * len(text), abs=10) and text.count("a") >= 400


def test_streams_of_a_mixture_go_on_where_they_were_saved() -> None:
    def stream() -> TokenStream:
        parts = {"a": (corpus("a", [4, 6, 5]), 1.0), "b": (corpus("b", [8, 8, 9]), 2.0)}
        return TokenStream(mixture(parts, block=1, seed=3), rows=2, length=7, seed=1)

    one, other = stream(), stream()
    for _ in range(5):
        next(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(next(one).tokens, next(other).tokens)


def test_impossible_mixtures() -> None:
    with pytest.raises(ValueError, match="the weight of b is 0.0; use a number above 0"):
        mixture({"a": (corpus("a", [3]), 1.0), "b": (corpus("b", [3]), 0.0)})
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        shuffled(corpus("a", [3]), block=0, seed=0)
