"""Languages that come one after the other: pairs of a sentence and its English, as texts of the bundled model."""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.data import locate

if TYPE_CHECKING:
    from .continual_methods.language import Text

SEQUENCES = {
    "Manx, Potawatomi": ("bible_glv_eng", "bible_pot_eng"),
    "Tagalog, Basque, Kabyle": ("tgl", "eus", "kab"),
}
LONGEST = 96  # tokens of a pair
Encode = Callable[[str], Tensor]  # without special tokens


@dataclass(frozen=True)
class Pairs:
    """One language: pairs to learn and to be asked about, as text and as ids (see `text_of`)."""

    shown: list[tuple[str, str]]
    learned: list[Text]
    asked: list[tuple[str, str]]
    asked_texts: list[Text]


def read_pairs(name: str, folder: str | None) -> list[tuple[str, str]]:
    """(source, English) of a Bible file, or of a language of Tatoeba."""
    bible = name.startswith("bible")
    path = f"mt/{name}.tsv.xz" if bible else "mt/tatoeba20_eng.tsv.xz"
    lines = lzma.decompress(locate(path, folder).read_bytes()).decode("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [(source, english) for first, source, english in rows if bible or first == name]


def text_of(source: str, english: str, encode: Encode, begin: int) -> Text:
    """Begin, source, " =", English, newline; asked for from the first token of the English on."""
    prompt = torch.cat([torch.tensor([begin]), encode(f"{source} =")])
    return torch.cat([prompt, encode(f" {english}\n")]), len(prompt)


def language(
    name: str, folder: str | None, encode: Encode, *, begin: int, seed: int, count: int, asked: int, tuning: bool
) -> Pairs:
    """The last fifth of the pairs that are short enough is test (every seed the same), before it learning and choosing.

    Pairs whose English is also asked for are not learned.
    """
    pairs = [p for p in read_pairs(name, folder) if len(text_of(*p, encode, begin)[0]) <= LONGEST]
    random.Random(0).shuffle(pairs)
    held = len(pairs) // 5
    test, rest = pairs[:held], pairs[held:]
    random.Random(seed).shuffle(rest)
    choosing, learning = rest[: len(rest) // 5], rest[len(rest) // 5 :]
    questions = (choosing if tuning else test)[:asked]
    known = {english for _, english in questions}
    shown = [p for p in learning if p[1] not in known][:count]
    return Pairs(
        shown,
        [text_of(*p, encode, begin) for p in shown],
        questions,
        [text_of(*p, encode, begin) for p in questions],
    )
