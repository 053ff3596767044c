"""MAD: six synthetic tasks that ask a sequence model for one ability each (Poli et al. 2024), base settings.

    task = MAD["selective-copying"]
    task.examples(64, (256, 256), seed=0)                        # as it is tested
    replace(task, training=True).examples(64, (256, 256), seed=0)  # recall trains on every next token

| task | vocabulary, length, training examples | asked |
|---|---|---|
| in-context-recall | 16, 128, 12,800 | the value of a key that was shown before |
| fuzzy-in-context-recall | 16, 128, 12,800 | the same; keys and values are motifs of 1-3 symbols (tested: keys of 3) |
| noisy-in-context-recall | 32, 128, 12,800 | the first again, a fifth of the pairs being noise of 16 symbols |
| selective-copying | 16, 256, 12,800 | 16 symbols between blanks, in order, after the copy token |
| compression | 16, 32, 12,800 | every token, to be decoded from the last position alone |
| memorization | 256, 32, 256 | the value of a key by a map that all examples share |

Recall pairs fill the length, but the last value is only asked: length - 1 tokens are read. Examples are distributed as
the authors' generators make them, with one slip less: the pair that fuzzy recall asks for is always shown.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.evals.suite import NOTHING, Examples, one_length

MAP_SEED = 12345  # of memorization's map
Made = tuple[Tensor, Tensor]  # tokens, targets


@dataclass(frozen=True, kw_only=True)
class MADTask:
    """One of the six. `vocab_size` counts special and noise symbols too."""

    name: str
    make: Callable[[MADTask, int, int, torch.Generator], Made]  # from task, count, length, generator
    vocab_size: int = 16
    length: int = 128
    train_examples: int = 12_800
    noise_symbols: int = 0
    noise: float = 0.0  # share of pairs
    copied: int = 16
    motif: int = 3
    training: bool = False
    version: int = 1

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` examples of one length. Raises ValueError for a length that the task cannot have."""
        length = one_length(self.name, lengths)
        return Examples(*self.make(self, count, length, torch.Generator().manual_seed(seed)))


def fits(task: MADTask, length: int, rule: str, holds: bool) -> None:
    """Raise ValueError unless the length obeys the rule."""
    if not holds:
        raise ValueError(f"length={length} of {task.name} must be {rule}; the base setting is {task.length}")


def shifted(task: MADTask, tokens: Tensor, asked: Tensor) -> Made:
    """Each position asks for the token after it: for all of them in training, else for those `asked`."""
    targets = tokens if task.training else tokens.masked_fill(~asked, NOTHING)
    return tokens[:, :-1], targets[:, 1:]


def recall(task: MADTask, count: int, length: int, generator: torch.Generator) -> Made:
    """Pairs of key and value, the last of a key that was shown; a value is asked where its key came before."""
    fits(task, length, "even and at least 4", length % 2 == 0 and length >= 4)
    half, pairs = (task.vocab_size - task.noise_symbols) // 2, length // 2
    values = torch.randint(half, 2 * half, (count, half), generator=generator)  # by key
    keys = torch.randint(half, (count, pairs), generator=generator)
    real = torch.rand(count, pairs, generator=generator) >= task.noise
    real.scatter_(1, torch.randint(pairs - 1, (count, 1), generator=generator), True)  # one at least
    shown = torch.zeros(count, pairs, half).scatter_(2, keys[..., None], real[..., None].float())  # at each place
    keys[:, -1:], real[:, -1] = torch.multinomial(shown[:, :-1].amax(1), 1, generator=generator), True
    before = (shown.cumsum(1) - shown).gather(2, keys[..., None])[..., 0] > 0  # (B, pairs)

    noise = torch.randint(2 * half, 2 * half + max(task.noise_symbols, 1), (count, pairs, 2), generator=generator)
    tokens = torch.where(real[..., None], torch.stack([keys, values.gather(1, keys)], 2), noise)
    asked = torch.stack([torch.zeros_like(real), real & before], 2)
    return shifted(task, tokens.flatten(1), asked.flatten(1))


def fuzzy_recall(task: MADTask, count: int, length: int, generator: torch.Generator) -> Made:
    """The same with motifs, row by row: their sizes differ."""
    fits(task, length, f"at least {6 * task.motif + 1}", length > 6 * task.motif)
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    rows = [fuzzy_row(task, length, rng) for _ in range(count)]
    tokens, asked = (torch.tensor(part) for part in zip(*rows, strict=True))
    return shifted(task, tokens, asked)


def fuzzy_row(task: MADTask, length: int, rng: random.Random) -> tuple[list[int], list[bool]]:
    """length + 1 tokens and whether each is asked: padding, pairs, and once more the pair shown at a random place."""
    padding, half = task.vocab_size - 1, (task.vocab_size - 1) // 2

    def motif(symbols: range, least: int = 1) -> tuple[int, ...]:
        return tuple(rng.sample(symbols, rng.randint(least, task.motif)))

    def new_key() -> tuple[int, ...]:
        return motif(range(half), 1 if task.training else task.motif)

    def new_value() -> tuple[int, ...]:
        return motif(range(half, padding))

    probe = new_key()
    known = {probe: new_value()}
    size = len(probe) + len(known[probe])
    end = length - size - 2 * task.motif  # no pair begins here or later
    at = min(rng.randrange(length - 2 * size), end - 2 * task.motif)
    tokens: list[int] = []
    asked: list[bool] = []
    shown: set[tuple[int, ...]] = set()
    while len(tokens) < end:
        key = probe if len(tokens) >= at and probe not in shown else new_key()
        value = known.setdefault(key, new_value())
        tokens += key + value
        asked += [False] * len(key) + [key in shown] * len(value)
        shown.add(key)
    tokens += probe + known[probe]
    asked += [False] * len(probe) + [True] * len(known[probe])
    before = length + 1 - len(tokens)
    return [padding] * before + tokens, [False] * before + asked


def selective_copying(task: MADTask, count: int, length: int, generator: torch.Generator) -> Made:
    """Symbols between blanks, the copy token, and as many blanks, at which the symbols are asked in order."""
    copy, blank, n = task.vocab_size - 1, task.vocab_size - 2, task.copied
    fits(task, length, f"at least {2 * n + 2}", length > 2 * n + 1)
    symbols = torch.randint(blank, (count, n), generator=generator)
    spread = torch.randint(n, (count, length - 2 * n - 1), generator=generator)  # before which symbol a blank stands
    places = torch.arange(n) + (spread[:, None] <= torch.arange(n)[:, None]).sum(2)  # (B, n)
    tokens = torch.full((count, length), blank).scatter_(1, places, symbols)
    tokens[:, -n - 1] = copy
    targets = torch.full_like(tokens, NOTHING)
    targets[:, -n:] = symbols
    return tokens, targets


def compression(task: MADTask, count: int, length: int, generator: torch.Generator) -> Made:
    """Symbols and the compression token; targets are the tokens themselves, for a decoder that sees the last output."""
    fits(task, length, "at least 2", length >= 2)
    tokens = torch.randint(task.vocab_size - 1, (count, length), generator=generator)
    tokens[:, -1] = task.vocab_size - 1
    return tokens, tokens.clone()


def memorization(task: MADTask, count: int, length: int, generator: torch.Generator) -> Made:
    """Keys, each followed by the insert token, which is asked for the key's value."""
    fits(task, length, "even and at least 2", length % 2 == 0 and length >= 2)
    half, insert = (task.vocab_size - 1) // 2, task.vocab_size - 1
    fixed = torch.Generator().manual_seed(MAP_SEED)
    values = half + torch.randperm(insert - half, generator=fixed)[:half]  # by key
    keys = torch.randint(half, (count, length // 2), generator=generator)
    tokens = torch.stack([keys, torch.full_like(keys, insert)], 2).flatten(1)
    return tokens, torch.stack([torch.full_like(keys, NOTHING), values[keys]], 2).flatten(1)


MAD = {
    task.name: task
    for task in (
        MADTask(name="in-context-recall", make=recall),
        MADTask(name="fuzzy-in-context-recall", make=fuzzy_recall),
        MADTask(name="noisy-in-context-recall", make=recall, vocab_size=32, noise_symbols=16, noise=0.2),
        MADTask(name="selective-copying", make=selective_copying, length=256),
        MADTask(name="compression", make=compression, length=32),
        MADTask(name="memorization", make=memorization, vocab_size=256, length=32, train_examples=256),
    )
}
