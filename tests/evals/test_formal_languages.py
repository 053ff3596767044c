"""Every label against brute force: enumeration of the language's words, Python's own arithmetic, composed tuples."""

import itertools
import re
from itertools import permutations

import pytest
import torch

from nestling.evals.formal_languages import LANGUAGES, PAPER, Language
from nestling.evals.suite import NOTHING

STRINGS = 60


def strings(name: str, lengths: tuple[int, int], seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Symbols and classes ("" where nothing is asked), without what pads them."""
    language = LANGUAGES[name]
    made = language.examples(STRINGS, lengths, seed)
    out = []
    for tokens, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        length = 1 + max(i for i, target in enumerate(targets) if target != NOTHING)
        classes = ["" if t == NOTHING else language.classes[t] for t in targets[:length]]
        out.append(([language.symbols[t] for t in tokens[:length]], classes))
        assert set(tokens[length:]) <= {0} and set(targets[length:]) <= {NOTHING}
    return out


@pytest.mark.parametrize(
    "name, pattern",
    [("parity", r"(0*10*1)*0*"), ("(aa)*", r"(aa)*"), ("(abab)*", r"(abab)*")],
)
def test_regular_languages_say_whether_each_prefix_is_a_member(name: str, pattern: str) -> None:
    for symbols, classes in strings(name, (1, 24)):
        for n, asked in enumerate(classes, 1):
            assert (asked == "yes") == bool(re.fullmatch(pattern, "".join(symbols[:n])))


def continuations(words: set[str], prefix: str) -> set[str]:
    """What may follow a prefix: symbols, or "end" where it is a word itself."""
    return {word[len(prefix) : len(prefix) + 1] or "end" for word in words if word.startswith(prefix)}


@pytest.mark.parametrize("name", ["a^n b^n", "a^n b^n c^n"])
def test_counter_languages_say_what_may_come_next(name: str) -> None:
    alphabet = LANGUAGES[name].symbols
    words = {"".join(s * n for s in alphabet) for n in range(1, 30)}
    for symbols, classes in strings(name, (2, 24)):
        assert "".join(symbols) in words
        for n, asked in enumerate(classes, 1):
            assert continuations(words, "".join(symbols[:n])) == set(asked.split(" or "))


def balanced(word: str, kind: str) -> bool:
    word = "".join(s for s in word if s in kind)
    while kind in word:
        word = word.replace(kind, "")
    return not word


def test_shuffle_2_says_which_brackets_may_close() -> None:
    every = ("".join(w) for n in range(0, 9, 2) for w in itertools.product("()[]", repeat=n))
    words = {w for w in every if balanced(w, "()") and balanced(w, "[]")}
    seen = set()
    for symbols, classes in strings("shuffle-2", (2, 8)):
        word = "".join(symbols)
        assert word in words
        for n, asked in enumerate(classes[:4], 1):  # a prefix of 4 closes within words of 8
            closing = continuations(words, word[:n]) & {")", "]"}
            assert closing == (set() if asked == "none" else set(asked.split(" or ")))
            seen.add(asked)
    assert seen == set(LANGUAGES["shuffle-2"].classes)


def test_shuffle_2_mixes_both_kinds_and_closes_everything_at_great_length() -> None:
    crossed = 0
    for symbols, classes in strings("shuffle-2", (60, 64)):
        word = "".join(symbols)
        assert balanced(word, "()") and balanced(word, "[]") and classes[-1] == "none"
        nested = word
        while "()" in nested or "[]" in nested:
            nested = nested.replace("()", "").replace("[]", "")
        crossed += bool(nested)  # balanced apart, not as nested brackets: no word of Dyck-2
    assert crossed > STRINGS // 2


@pytest.mark.parametrize("modulus", [3, 5])
def test_modular_counting(modulus: int) -> None:
    for symbols, classes in strings(f"count-mod-{modulus}", (1, 30)):
        assert classes == [str(symbols[:n].count("1") % modulus) for n in range(1, len(symbols) + 1)]


def test_modular_arithmetic_is_pythons() -> None:
    for symbols, classes in strings("arithmetic-mod-5", (1, 31)):
        for n, asked in enumerate(classes, 1):
            assert asked == (str(eval("".join(symbols[:n])) % 5) if n % 2 else "")


def test_s5_composes_in_the_order_of_reading() -> None:
    every = list(permutations(range(5)))
    made = LANGUAGES["s5"].examples(20, (12, 12), seed=1)
    for tokens, targets in zip(made.tokens.tolist(), made.targets.tolist(), strict=True):
        product = tuple(range(5))
        for token, target in zip(tokens, targets, strict=True):
            product = tuple(every[token][i] for i in product)
            assert every[target] == product


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_examples_have_the_lengths_they_are_asked_for_and_repeat_by_seed(language: Language) -> None:
    made = language.examples(200, (10, 22), seed=3)
    lengths = 1 + (made.targets != NOTHING).long().mul(torch.arange(made.targets.shape[1])).amax(1)
    allowed = {n for n in range(10, 23) if n >= language.first and (n - language.first) % language.step == 0}
    assert set(lengths.tolist()) == allowed
    assert made.tokens.dtype == made.targets.dtype == torch.int64
    assert int(made.tokens.max()) < len(language.symbols) and int(made.targets.max()) < len(language.classes)
    again, other = language.examples(200, (10, 22), seed=3), language.examples(200, (10, 22), seed=4)
    assert torch.equal(made.tokens, again.tokens) and torch.equal(made.targets, again.targets)
    assert made.targets.shape != other.targets.shape or not torch.equal(made.targets, other.targets)
    with pytest.raises(ValueError, match=r"lengths=\(0, 0\)"):
        language.examples(4, (0, 0), seed=0)


def test_the_six_of_the_paper_are_there() -> None:
    assert set(PAPER) < set(LANGUAGES) and len(PAPER) == 6
