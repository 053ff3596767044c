"""Experience replay: a reservoir of earlier examples, from which as many as a batch has are learned again with it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .fine_tuning import Example


class Reservoir:
    """Every example so far is in it with the same probability (Vitter 1985).

    Args:
        size: examples that it holds. seed: of what is kept and what is drawn.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size, self.random = size, random.Random(seed)
        self.held: list[Example] = []
        self.seen = 0

    def mixed(self, batch: Sequence[Example]) -> Sequence[Example]:
        """As many earlier examples as the batch has, all different; then the batch is taken in."""
        drawn = self.random.sample(self.held, min(len(batch), len(self.held)))
        for example in batch:
            self.add(example)
        return drawn

    def add(self, example: Example) -> None:
        self.seen += 1
        if len(self.held) < self.size:
            self.held.append(example)
        elif (place := self.random.randrange(self.seen)) < self.size:
            self.held[place] = example
