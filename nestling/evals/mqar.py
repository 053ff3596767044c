"""Multi-query associative recall: key-value pairs first, then each key once more, and its value is asked.

    task = MQAR(pairs=4)
    task.examples(64, (64, 64), seed=0)        # the key at position t asks for targets[:, t]

`ZOOLOGY`, `BASED_TRAIN` and `BASED_TEST` are the published settings. As in Zoology (Arora et al. 2024): keys are
1 ... V/2 - 1 and values V/2 ... V - 1, each at most once; the gap between the pairs and a query follows a power law
(`power` 1 = uniform, 0.01 = mostly near). What is neither pair nor query is token 0, or with `random_rest` drawn from
the whole vocabulary, keys included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.evals.suite import NOTHING, Examples, one_length

_ENTRIES = 2**22  # random numbers held at once while keys or values are drawn


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """`pairs` key-value pairs, in strings of even length of at least four tokens per pair."""

    pairs: int = 8
    vocab_size: int = 8192
    power: float = 0.01
    random_rest: bool = True
    version: int = 1

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.vocab_size // 2 <= self.pairs:
            raise ValueError(
                f"pairs={self.pairs} with vocab_size={self.vocab_size}: keys are half of the vocabulary less one; "
                "use at least 1 pair and a larger vocabulary"
            )
        if self.power <= 0:
            raise ValueError(f"power={self.power} must be positive; 1 spreads the queries evenly")

    @property
    def name(self) -> str:
        return f"mqar-{self.pairs}"

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` strings of one length. Raises ValueError if the pairs and their queries do not fit into it."""
        length = one_length(self.name, lengths)
        if length % 2 or length < 4 * self.pairs:
            raise ValueError(
                f"length={length} must be even and at least 4 tokens per pair, {4 * self.pairs} for {self.name}"
            )
        generator = torch.Generator().manual_seed(seed)
        half, shown = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + distinct(count, half - 1, self.pairs, generator)  # (B, pairs)
        values = half + distinct(count, self.vocab_size - half, self.pairs, generator)

        gaps = torch.arange(1, (length - shown) // 2 + 1, dtype=torch.float64) ** (self.power - 1)
        asked = shown + 2 * torch.multinomial(gaps.expand(count, -1), self.pairs, generator=generator)
        tokens = torch.randint(self.vocab_size if self.random_rest else 1, (count, length), generator=generator)
        tokens[:, :shown] = torch.stack([keys, values], 2).flatten(1)
        tokens.scatter_(1, asked, keys)
        return Examples(tokens, torch.full_like(tokens, NOTHING).scatter_(1, asked, values))


def distinct(count: int, choices: int, drawn: int, generator: torch.Generator) -> Tensor:
    """(count, drawn): numbers below `choices`, each at most once in a row, every order equally likely."""
    rows = max(1, _ENTRIES // choices)
    sizes = [min(rows, count - i) for i in range(0, count, rows)]
    return torch.cat([torch.rand(n, choices, generator=generator).topk(drawn).indices for n in sizes])


Setting = tuple[MQAR, int, int]  # task, length, examples

ZOOLOGY: tuple[Setting, ...] = tuple(
    (MQAR(pairs=pairs, random_rest=False), length, 100_000)
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
)  # figure 2: a model for each, tested on 3,000 other examples of it
BASED_TRAIN: tuple[Setting, ...] = (
    (MQAR(pairs=4), 64, 100_000),
    (MQAR(pairs=8), 128, 20_000),
    (MQAR(pairs=16), 256, 20_000),
    (MQAR(pairs=32), 256, 20_000),
    (MQAR(pairs=64), 256, 20_000),
)  # all in one model
BASED_TEST: tuple[Setting, ...] = tuple(
    (MQAR(pairs=pairs), length, 1_000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)
