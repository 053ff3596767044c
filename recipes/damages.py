"""Ways to damage a training set, its order, or its gradients, each by an amount and a seed. Held-out data stay clean.

Functions of labels or counts that return labels or rows (of one set to train on), so that they work for any data.
Amount 0 of each is no damage. `torch.Generator`s are the caller's: one seed, one damage, whatever the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor


def noisy_labels(labels: Tensor, share: float, classes: int, generator: Generator) -> Tensor:
    """Labels (N,) of which `share` were replaced, each by another class, all others equally likely."""
    check_share(share)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    moved = labels.clone()
    moved[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=generator)) % classes
    return moved


def duplicated(count: int, share: float, copies: int, generator: Generator) -> Tensor:
    """(count,) rows of which `share` are copies of a few, `copies` of each; the others are different rows once each."""
    check_share(share)
    order = torch.randperm(count, generator=generator)
    repeated = round(share * count)
    few = order[: -(-repeated // copies)].repeat_interleave(copies)[:repeated]
    return torch.cat([few, order[repeated:]])


def missing(labels: Tensor, share: float, rare: Iterable[int], generator: Generator) -> Tensor:
    """The rows that are left of labels (N,) when each class in `rare` lost `share` of its samples."""
    check_share(share)
    kept = torch.ones(len(labels), dtype=torch.bool)
    for label in rare:
        rows = (labels == label).nonzero().squeeze(1)
        lost = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]
        kept[rows[lost]] = False
    return kept.nonzero().squeeze(1)


def in_blocks(labels: Tensor, block: int, generator: Generator) -> Iterator[Tensor]:
    """Endless blocks of rows (block,): every sample of a block has one class, drawn anew for each block.

    A class gives its rows in a shuffled order and starts again when none is left.
    """
    if block < 1:
        raise ValueError(f"block is {block}; use the number of samples of one class in a row, at least 1")
    kinds = labels.unique()
    left = {int(kind): torch.empty(0, dtype=torch.long) for kind in kinds}
    while True:
        kind = int(kinds[torch.randint(len(kinds), (), generator=generator)])
        while len(left[kind]) < block:
            rows = (labels == kind).nonzero().squeeze(1)
            left[kind] = torch.cat([left[kind], rows[torch.randperm(len(rows), generator=generator)]])
        yield left[kind][:block]
        left[kind] = left[kind][block:]


def rebatched(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The rows of pieces of any length, in their order, as batches of one size."""
    held = torch.empty(0, dtype=torch.long)
    for piece in pieces:
        held = torch.cat([held, piece])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]


def add_heavy_noise(gradients: Iterable[Tensor], scale: float, generator: Generator) -> None:
    """Add Student's t with 2 degrees of freedom, which has no variance, times `scale` and the RMS of the gradient.

    t = (u - 1/2) sqrt(2 / (u (1 - u))) of a uniform u is its quantile function; 24 bits of u cut it at about 3,000.
    """
    for g in gradients:
        u = torch.empty_like(g).uniform_(2**-24, 1 - 2**-24, generator=generator)
        spread = (u - u * u).rsqrt_()
        g.addcmul_(u.sub_(0.5), spread, value=float(g.norm()) * scale * (2 / max(1, g.numel())) ** 0.5)


def check_share(share: float) -> None:
    """Raise ValueError unless it is a part of one."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; use the damaged part, 0 ... 1")
