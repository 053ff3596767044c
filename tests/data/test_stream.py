"""Rows are contiguous, wrap by themselves, mark documents, and start again exactly where they were saved."""

import json

import numpy as np
import pytest
import torch

from nestling.data import ByteTokenizer, TokenStream, held_out_windows, tokenize
from nestling.data.tokens import Tokens, digest


def counting(n: int, pieces: int = 1, starts: tuple[int, ...] = (0,)) -> Tokens:
    ids = np.arange(n)
    return Tokens(
        pieces=np.array_split(ids, pieces),
        starts=np.array(starts),
        tokenizer="none",
        fingerprint=digest([ids], np.array(starts)),
    )


@pytest.mark.parametrize(
    ("n", "rows", "length", "pieces"), [(100, 3, 7, 1), (64, 4, 16, 3), (9, 2, 8, 2), (50, 1, 1, 50)]
)
def test_rows_are_contiguous_and_wrap(n, rows, length, pieces):
    stream = TokenStream(counting(n, pieces), rows=rows, length=length, seed=3)
    batches = [next(stream) for _ in range(2 * n // length + 3)]
    assert all(torch.equal(b.tokens[:, -1], c.tokens[:, 0]) for b, c in zip(batches, batches[1:], strict=False))
    read = torch.cat([b.inputs for b in batches], dim=1)
    assert torch.equal(read[:, 1:], (read[:, :-1] + 1) % n)  # no token skipped, doubled or reordered, also at the wrap
    assert all(torch.equal(b.tokens[:, 1:], (b.inputs + 1) % n) for b in batches)
    assert all(set(row.tolist()) == set(range(n)) for row in read)


def test_rows_start_at_equal_distances():
    first = next(TokenStream(counting(120), rows=4, length=5, seed=0)).tokens[:, 0]
    assert torch.equal((first - first[0]) % 120, torch.tensor([0, 30, 60, 90]))


def test_seed_decides_and_repeats():
    def start(seed: int) -> int:
        return int(next(TokenStream(counting(1000), rows=1, length=4, seed=seed)).tokens[0, 0])

    assert start(1) == start(1) and len({start(seed) for seed in range(8)}) > 4


def test_document_borders_are_marked_also_at_the_wrap():
    stream = TokenStream(counting(40, pieces=3, starts=(0, 13, 14)), rows=2, length=11, seed=5)
    for _ in range(12):
        batch = next(stream)
        assert torch.equal(batch.new_document, torch.isin(batch.tokens, torch.tensor([0, 13, 14])))


def test_position_saves_and_restores_exactly():
    whole = TokenStream(counting(97), rows=3, length=10, seed=1)
    cut = TokenStream(counting(97), rows=3, length=10, seed=1)
    for _ in range(7):
        next(whole), next(cut)
    saved = json.loads(json.dumps(cut.state_dict()))
    resumed = TokenStream(counting(97), rows=3, length=10, seed=1)
    resumed.load_state_dict(saved)
    for _ in range(20):
        a, b = next(whole), next(resumed)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.new_document, b.new_document)


@pytest.mark.parametrize("other", [{"n": 98}, {"rows": 2}, {"length": 9}, {"seed": 2}])
def test_position_of_another_stream_is_refused(other):
    sizes = {"n": 97, "rows": 3, "length": 10, "seed": 1}
    saved = TokenStream(counting(sizes.pop("n")), **sizes).state_dict()
    sizes |= other
    with pytest.raises(ValueError, match="saved position is of a stream with"):
        TokenStream(counting(sizes.pop("n", 97)), **sizes).load_state_dict(saved)


def test_tokenize_packs_documents():
    tokens = tokenize(["ab", "cde", "f"], ByteTokenizer())
    assert bytes(tokens.take(0, 6).tolist()) == b"abcdef" and tokens.starts.tolist() == [0, 2, 5]
    assert tokens.fingerprint != tokenize(["abc", "def"], ByteTokenizer()).fingerprint
    assert tokens.fingerprint == tokenize(["ab", "cde", "f"], ByteTokenizer()).fingerprint


def test_held_out_windows_are_fixed_and_inside():
    windows = held_out_windows(counting(100), length=9, count=4)
    assert windows.shape == (4, 10) and windows[0, 0] == 0 and windows[-1, -1] == 99
    assert torch.equal(windows, held_out_windows(counting(100), length=9, count=4))
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)


def test_errors():
    with pytest.raises(ValueError, match="fewer than length"):
        TokenStream(counting(5), rows=1, length=5)
    with pytest.raises(ValueError, match="at least 1"):
        TokenStream(counting(5), rows=0, length=2)
    with pytest.raises(ValueError, match="fewer than one window of 6"):
        held_out_windows(counting(5), length=5, count=1)
    with pytest.raises(ValueError, match="no tokens"):
        tokenize([], ByteTokenizer())


def test_nothing_is_predicted_across_a_document_border() -> None:
    tokens = tokenize(["abcdefgh", "ijklmnop"], ByteTokenizer())
    batch = next(TokenStream(tokens, rows=1, length=15, seed=0))
    starts = batch.new_document[:, 1:]
    assert starts.any() and (batch.targets[starts] == -1).all()
    assert torch.equal(batch.targets[~starts], batch.tokens[:, 1:][~starts])
    assert batch.borders is not None and torch.equal(batch.borders, batch.new_document[:, :-1])
    inside = type(batch)(tokens=batch.tokens, new_document=torch.zeros_like(batch.new_document))
    assert inside.borders is None


def test_processes_that_read_their_own_rows_read_what_one_would():
    whole = TokenStream(counting(50, starts=(0, 20)), rows=4, length=9, seed=1)
    parts = [TokenStream(whole.tokens, rows=4, length=9, seed=1, only=rows) for rows in (range(0, 1), range(1, 4))]
    for _ in range(8):
        batch, pieces = next(whole), [next(part) for part in parts]
        assert torch.equal(batch.tokens, torch.cat([piece.tokens for piece in pieces]))
        assert torch.equal(batch.select(torch.tensor([2])).new_document, pieces[1].new_document[1:2])
    parts[0].load_state_dict(whole.state_dict())
