"""Formal languages and word problems: a string goes in symbol by symbol, a class is asked at its positions.

    language = LANGUAGES["parity"]
    language.examples(64, (1, 40), seed=0)                    # tokens and targets (64, <= 40)
    table([score(model, language, 100, (41, 160), seed=0)])   # suite.py

| name | symbols | asked at every position |
|---|---|---|
| parity | 0 1 | is the prefix in the language (an even number of 1)? |
| (aa)* | a | is the prefix in the language (its length even)? |
| (abab)* | a b | is the prefix in the language (its length a multiple of four)? |
| a^n b^n | a b | which symbols may come next: a or b, b, the end |
| a^n b^n c^n | a b c | which symbols may come next: a or b, b, c, the end |
| shuffle-2 | ( ) [ ] | which brackets may close next: none, ), ], both |
| count-mod-3, count-mod-5 | 0 1 | number of 1 in the prefix, modulo 3 or 5 |
| arithmetic-mod-5 | 0 ... 4 + - * | value of the prefix modulo 5, * before + and -; asked after digits |
| s5 | the 120 permutations of five things | product of the prefix |

The first six and their labels are those of Bhattamishra et al. 2020, which Irie et al. 2023 and the paper's Table 5
use: every string is a member (of parity too, there; here its bits are drawn freely), one class per position, and a
string counts as right only if all its positions are (`Score.exact_share`). Lengths are drawn uniformly from those that
the language has. The others: Deletang et al. 2023 (modular arithmetic), Merrill et al. 2024 (S5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from nestling.evals.suite import NOTHING, Examples

Strings = tuple[Tensor, Tensor]  # tokens and targets (B, T), anything past a row's length
Make = Callable[[Tensor, torch.Generator], Strings]  # from the lengths (B,)


@dataclass(frozen=True, kw_only=True)
class Language:
    """A language and what is asked about its strings; lengths are `first` + a multiple of `step`."""

    name: str
    symbols: tuple[str, ...]
    classes: tuple[str, ...]
    make: Make
    step: int = 1
    first: int = 0
    version: int = 1

    @property
    def vocab_size(self) -> int:
        return max(len(self.symbols), len(self.classes))

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` strings with lengths in the closed range. Raises ValueError if the language has none of them."""
        generator = torch.Generator().manual_seed(seed)
        low, high = lengths
        fits = [n for n in range(max(low, 1), high + 1) if n >= self.first and (n - self.first) % self.step == 0]
        if not fits:
            raise ValueError(
                f"lengths={lengths}: {self.name} has no string of that length; "
                f"its lengths are {self.first} plus multiples of {self.step}"
            )
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        drawn = torch.tensor(fits)[torch.randint(len(fits), (count,), generator=generator)]
        tokens, targets = self.make(drawn, generator)
        beyond = torch.arange(tokens.shape[1]) >= drawn[:, None]
        return Examples(tokens.masked_fill(beyond, 0), targets.masked_fill(beyond, NOTHING))


def places(lengths: Tensor) -> Tensor:
    """(B, T): 0, 1, 2, ... in every row."""
    return torch.arange(int(lengths.max())).expand(len(lengths), -1)


def bits(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """(B, T) zeros and ones, each with probability one half."""
    return torch.randint(2, (len(lengths), int(lengths.max())), generator=generator)


def parity(lengths: Tensor, generator: torch.Generator) -> Strings:
    tokens = bits(lengths, generator)
    return tokens, 1 - tokens.cumsum(1) % 2


def counted(modulus: int) -> Make:
    """Number of ones, modulo `modulus`."""

    def make(lengths: Tensor, generator: torch.Generator) -> Strings:
        tokens = bits(lengths, generator)
        return tokens, tokens.cumsum(1) % modulus

    return make


def repeated(symbols: int, period: int) -> Make:
    """The symbols in turn; a prefix is a member where its length is a multiple of `period`."""

    def make(lengths: Tensor, generator: torch.Generator) -> Strings:
        place = places(lengths)
        return place % symbols, ((place + 1) % period == 0).long()

    return make


def counters(symbols: int) -> Make:
    """n times each symbol in turn. Class 0: a or b; class s: only symbol s; class `symbols`: the end."""

    def make(lengths: Tensor, generator: torch.Generator) -> Strings:
        n = (lengths // symbols)[:, None]
        phase, index = places(lengths) // n, places(lengths) % n
        return phase.clamp_max(symbols - 1), torch.where(phase == 0, 0, phase + (index == n - 1)).clamp_max(symbols)

    return make


def shuffle_2(lengths: Tensor, generator: torch.Generator) -> Strings:
    """Two kinds of brackets, each balanced by itself: a walk that opens or closes by the toss of a coin where both can
    be done, by a second coin which, and closes what is open in time."""
    rows, longest = len(lengths), int(lengths.max())
    open_ = torch.zeros(rows, 2, dtype=torch.long)
    coins = torch.randint(2, (longest, 2, rows), generator=generator)
    tokens, targets = torch.empty(2, rows, longest, dtype=torch.long)
    for t, (up, which) in enumerate(coins):
        total = open_.sum(1)
        closing = (total > 0) & ((up == 0) | (total >= lengths - t))
        which = torch.where(closing & (open_.gather(1, which[:, None])[:, 0] == 0), 1 - which, which)
        open_.scatter_add_(1, which[:, None], torch.where(closing, -1, 1)[:, None])
        tokens[:, t] = 2 * which + closing
        targets[:, t] = (open_ > 0).long() @ torch.tensor([1, 2])
    return tokens, targets


def arithmetic(modulus: int) -> Make:
    """Digits with + - * between them. `closed` is the sum of the finished terms, `term` the one * still changes."""

    def make(lengths: Tensor, generator: torch.Generator) -> Strings:
        rows, longest = len(lengths), int(lengths.max())
        digits = torch.randint(modulus, (longest, rows), generator=generator)
        operators = torch.randint(3, (longest, rows), generator=generator)  # + - *
        tokens, targets = torch.full((2, rows, longest), NOTHING)
        closed, term = torch.zeros(rows, dtype=torch.long), digits[0]
        tokens[:, 0] = targets[:, 0] = term
        for t in range(2, longest, 2):
            times, digit = operators[t] == 2, digits[t]
            closed = torch.where(times, closed, closed + term) % modulus
            term = torch.where(times, term * digit, torch.where(operators[t] == 1, -digit, digit)) % modulus
            tokens[:, t - 1], tokens[:, t] = modulus + operators[t], digit
            targets[:, t] = (closed + term) % modulus
        return tokens, targets

    return make


@cache
def products(size: int) -> Tensor:
    """(N, N): which permutation comes of doing the row's first and then the column's, all N in lexicographic order."""
    every = torch.tensor(list(permutations(range(size))))  # (N, size)
    joined = every[:, every].permute(1, 0, 2)  # [first, second, i] = second[first[i]]
    weights = size ** torch.arange(size - 1, -1, -1)
    return torch.searchsorted(every @ weights, joined @ weights)  # codes ascend in lexicographic order


def permuted(size: int) -> Make:
    """Permutations, one after the other; the class is what they have done together."""

    def make(lengths: Tensor, generator: torch.Generator) -> Strings:
        join = products(size)
        tokens = torch.randint(len(join), (len(lengths), int(lengths.max())), generator=generator)
        targets = tokens.clone()
        for t in range(1, tokens.shape[1]):
            targets[:, t] = join[targets[:, t - 1], tokens[:, t]]
        return tokens, targets

    return make


def named(count: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(count))


_MEMBER = ("no", "yes")
_S5 = tuple("".join(str(i + 1) for i in p) for p in permutations(range(5)))

PAPER = ("parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "shuffle-2")  # Table 5
LANGUAGES = {
    language.name: language
    for language in (
        Language(name="parity", symbols=("0", "1"), classes=_MEMBER, make=parity),
        Language(name="(aa)*", symbols=("a",), classes=_MEMBER, make=repeated(1, 2), step=2),
        Language(name="(abab)*", symbols=("a", "b"), classes=_MEMBER, make=repeated(2, 4), step=4),
        Language(name="a^n b^n", symbols=("a", "b"), classes=("a or b", "b", "end"), make=counters(2), step=2),
        Language(
            name="a^n b^n c^n", symbols=("a", "b", "c"), classes=("a or b", "b", "c", "end"), make=counters(3), step=3
        ),
        Language(
            name="shuffle-2", symbols=("(", ")", "[", "]"), classes=("none", ")", "]", ") or ]"), make=shuffle_2, step=2
        ),
        Language(name="count-mod-3", symbols=("0", "1"), classes=named(3), make=counted(3)),
        Language(name="count-mod-5", symbols=("0", "1"), classes=named(5), make=counted(5)),
        Language(
            name="arithmetic-mod-5",
            symbols=(*named(5), "+", "-", "*"),
            classes=named(5),
            make=arithmetic(5),
            step=2,
            first=1,
        ),
        Language(name="s5", symbols=_S5, classes=_S5, make=permuted(5)),
    )
}
