"""Rows of different phase in one frame: every row's chunks end at the frame's borders, and outputs come back."""

import pytest
import torch

from nestling.ops.alignment import align

SIZE = 4


def row_borders(count, length):
    """How many of a row's new tokens lie before each of its chunk borders."""
    return [n for n in range(1, length + 1) if (count + n) % SIZE == 0]


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [([0, 3, 1], [9, 9, 9]), ([2, 3, 3], [9, 0, 4]), ([1, 1, 1], [9, 5, 2]), ([0, 0, 3], [1, 0, 1])],
    ids=str,
)
def test_every_row_meets_its_borders_in_the_frame(counts, lengths):
    tokens = max(lengths)
    x = torch.arange(3 * tokens).view(3, tokens, 1)
    frame = align(x, torch.tensor(counts), torch.tensor(lengths), SIZE)
    inside, alive = frame.enter(x), frame.alive()
    assert inside.shape[1] == alive.shape[1] == frame.frame
    assert torch.equal(frame.leave(inside), x)
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        assert torch.equal(inside[row, alive[row]], x[row, :length])
        met = [part.stop for part in frame.chunks() if frame.is_border(part.stop) and frame.full(part.stop)[row]]
        seen = [int(alive[row, :border].sum()) for border in met]
        assert seen == row_borders(count, length)


@pytest.mark.parametrize("count", [None, torch.tensor([3, 3])])
def test_equal_phases_are_not_shifted(count):
    x = torch.randn(2, 9, 3)
    frame = align(x, count, None, SIZE)
    assert frame.enter(x) is x and frame.leave(x) is x and frame.alive() is None and frame.full(4) is None
    assert [part.stop for part in frame.chunks()] == ([4, 8, 9] if count is None else [1, 5, 9])


@pytest.mark.parametrize(("tokens", "phase", "stops"), [(0, 0, []), (2, 1, [2]), (3, 1, [3]), (4, 0, [4])])
def test_short_calls(tokens, phase, stops):
    frame = align(torch.zeros(1, tokens), torch.tensor([phase]), None, SIZE)
    assert [part.stop for part in frame.chunks()] == stops
    assert [frame.is_border(stop) for stop in stops] == [phase + stop == SIZE for stop in stops]
