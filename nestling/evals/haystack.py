"""A haystack: sentences of a text from a random one on, to an exact number of tokens, with things hidden in between."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def scattered(
    hidden: Sequence[np.ndarray], sentences: Sequence[np.ndarray], room: int, rng: random.Random
) -> tuple[list[np.ndarray], list[int]]:
    """Sentences of together `room` tokens, the last one cut, with what is hidden between them, in order.

    Returns the pieces, and which of them are the hidden ones. The text begins again where it ends.
    """
    start, left = rng.randrange(len(sentences)), room
    pieces: list[np.ndarray] = []
    while left > 0:
        sentence = sentences[(start + len(pieces)) % len(sentences)][:left]
        pieces.append(sentence)
        left -= len(sentence)
    gaps = sorted(rng.choices(range(len(pieces) + 1), k=len(hidden)))
    for gap, fact in reversed(list(zip(gaps, hidden, strict=True))):  # from the end, so that gaps stay where they are
        pieces.insert(gap, fact)
    return pieces, [gap + i for i, gap in enumerate(gaps)]
