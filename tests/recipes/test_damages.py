"""Each damage does what its amount says, is none at amount 0, and depends on its seed alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from recipes import damages

LABELS = torch.arange(10).repeat_interleave(50)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_exactly_a_share_of_the_labels_is_wrong(share: float) -> None:
    noisy = damages.noisy_labels(LABELS, share, 10, seeded())
    assert int((noisy != LABELS).sum()) == round(share * 500)
    assert set(noisy.tolist()) == set(range(10))


def test_wrong_labels_are_spread_over_all_other_classes() -> None:
    labels = torch.full((9000,), 3)
    counts = Counter(damages.noisy_labels(labels, 1.0, 10, seeded()).tolist())
    assert set(counts) == set(range(10)) - {3}
    assert all(800 < n < 1200 for n in counts.values())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_copies_take_the_place_of_other_rows(share: float) -> None:
    rows = damages.duplicated(400, share, 20, seeded())
    counts = Counter(rows.tolist())
    assert len(rows) == 400
    assert Counter(counts.values()) == Counter({20: int(share * 20)} if share else {}) + Counter(
        {1: round(400 * (1 - share))}
    )


def test_rare_classes_lose_their_share_and_no_other() -> None:
    left = Counter(LABELS[damages.missing(LABELS, 0.9, [2, 7], seeded())].tolist())
    assert left == Counter({k: 5 if k in (2, 7) else 50 for k in range(10)})
    assert len(damages.missing(LABELS, 0.0, [2, 7], seeded())) == 500
    assert 2 not in LABELS[damages.missing(LABELS, 1.0, [2], seeded())]


def test_blocks_hold_one_class_and_use_every_sample() -> None:
    blocks = list(islice(damages.in_blocks(LABELS, 25, seeded()), 200))
    assert all(len(block) == 25 and len(LABELS[block].unique()) == 1 for block in blocks)
    assert len({int(LABELS[block[0]]) for block in blocks}) == 10
    first = [block for block in blocks if LABELS[block[0]] == 4][:2]
    assert torch.cat(first).unique().numel() == 50  # two blocks of 25: each of the 50 samples once


def test_blocks_longer_than_their_class_repeat_it() -> None:
    block = next(damages.in_blocks(LABELS, 120, seeded()))
    assert sorted(Counter(block.tolist()).values())[0] >= 2


def test_batches_keep_the_order_of_the_pieces() -> None:
    pieces = [torch.arange(0, 3), torch.arange(3, 10), torch.arange(10, 11)]
    assert torch.cat(list(damages.rebatched(pieces, 4))).tolist() == list(range(8))


def test_heavy_noise_is_the_t_distribution_of_two_degrees() -> None:
    g = torch.full((200_000,), 0.5)
    damages.add_heavy_noise([g], 2.0, seeded())
    t = (g - 0.5) / (2.0 * 0.5)
    for value in (0.5, 1.0, 4.0, 20.0):  # its distribution function is 1/2 + t / (2 sqrt(2 + t^2))
        expected = 0.5 + value / (2 * (2 + value**2) ** 0.5)
        assert float((t < value).double().mean()) == pytest.approx(expected, abs=0.004)
    none = torch.randn(7, generator=seeded())
    kept = none.clone()
    damages.add_heavy_noise([kept], 0.0, seeded())
    assert torch.equal(kept, none)


def test_one_seed_is_one_damage() -> None:
    for make in (
        lambda s: damages.noisy_labels(LABELS, 0.4, 10, seeded(s)),
        lambda s: damages.duplicated(500, 0.8, 100, seeded(s)),
        lambda s: damages.missing(LABELS, 0.5, [1], seeded(s)),
        lambda s: next(damages.in_blocks(LABELS, 16, seeded(s))),
    ):
        assert torch.equal(make(3), make(3))
        assert not torch.equal(make(3), make(4))


def test_amounts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="share is 1.5"):
        damages.missing(LABELS, 1.5, [0], seeded())
    with pytest.raises(ValueError, match="block is 0"):
        next(damages.in_blocks(LABELS, 0, seeded()))
