"""A split tensor: its parts, in which order they lie, and where their pieces belong."""

import pytest
import torch

from nestling.core.spread import Split, is_spread, local, whole, whole_norm


@pytest.mark.parametrize(
    ("split", "shape"),
    [(Split(0), (6, 4)), (Split(0, 3), (12, 4)), (Split(1, 2), (3, 8)), (Split(2), (2, 3, 6))],
)
def test_pieces_of_all_parts_make_the_whole(split: Split, shape: tuple[int, ...]) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    again = torch.full_like(x, -1)
    lying = split.sorted(x, 2).chunk(2, split.dim)
    for part in (0, 1):
        mine = split.cut(x, part, 2)
        assert torch.equal(mine, lying[part])
        found = split.pieces(mine, part, 2)
        assert len(found) == split.blocks
        for first, piece in found:
            again.narrow(split.dim, first, piece.shape[split.dim]).copy_(piece)
    assert torch.equal(again, x)


def test_a_part_has_its_share_of_every_block() -> None:
    q, k, v = (torch.full((4, 2), i) + torch.arange(4)[:, None] * 10 for i in range(3))
    part = Split(0, blocks=3).cut(torch.cat([q, k, v]), 1, 2)
    assert torch.equal(part, torch.cat([q[2:], k[2:], v[2:]]))


def test_nothing_spread_is_left_as_it_is() -> None:
    x = torch.ones(3)
    assert not is_spread(x) and whole(x) is x and local(x) is x and whole_norm(x, x) is x
