"""Classes that come a few at a time: CLINC150 by its domains, Banking77 and DBpedia by chance.

One seed decides which classes come when, which of the training texts are validation (a fifth), which are used, and
their order. Test texts are the same for every seed.
"""

from __future__ import annotations

import json
import lzma
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.data import locate

LONGEST = 40  # tokens of a text
Pair = tuple[str, str]  # text, class
Example = tuple[Tensor, int]


@dataclass(frozen=True)
class Texts:
    """A data set: training and test pairs, and groups of classes that belong together (empty: none do)."""

    train: list[Pair]
    test: list[Pair]
    groups: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What of a data set is used.

    Attributes:
        tasks: number of them. train, validation, test: texts per class.
    """

    tasks: int
    train: int
    validation: int
    test: int


SIZES = {
    "CLINC150": Size(tasks=10, train=10, validation=5, test=5),
    "Banking77": Size(tasks=10, train=10, validation=5, test=8),
    "DBpedia": Size(tasks=5, train=40, validation=20, test=40),
}


@dataclass(frozen=True)
class Stream:
    """Tasks in turn. Examples are (ids, label); labels count the classes in the order in which they come.

    Attributes:
        names: of the classes, by label. train, validation, test: by task. shown: the training texts, by task.
    """

    names: list[str]
    train: list[list[Example]]
    validation: list[list[Example]]
    test: list[list[Example]]
    shown: list[list[tuple[str, int]]]
    asked: list[list[tuple[str, int]]]


def load_texts(name: str, folder: str | None) -> Texts:
    """One of SIZES, from the data folder."""
    return {"CLINC150": _clinc, "Banking77": _banking, "DBpedia": _dbpedia}[name](folder)


def _clinc(folder: str | None) -> Texts:
    data = _json("cl/clinc150_100.json.xz", folder)
    return Texts(_pairs(data["train"]), _pairs(data["test"]), list(data["domains"].values()))


def _banking(folder: str | None) -> Texts:
    data = _json("cl/banking77_52.json.xz", folder)
    return Texts(_pairs(data["train"]), _pairs(data["test"]), [])


def _dbpedia(folder: str | None) -> Texts:
    """It has one split: the last 80 texts of every class are its test texts."""
    lines = lzma.decompress(locate("cl/dbpedia14_10.jsonl.xz", folder).read_bytes()).decode("utf-8").splitlines()
    by_class: dict[str, list[Pair]] = defaultdict(list)
    for item in map(json.loads, lines):
        by_class[item["label"]].append((item["text"], item["label"]))
    held = SIZES["DBpedia"].test
    return Texts(
        [pair for pairs in by_class.values() for pair in pairs[:-held]],
        [pair for pairs in by_class.values() for pair in pairs[-held:]],
        [],
    )


def _json(path: str, folder: str | None) -> Any:
    return json.loads(lzma.decompress(locate(path, folder).read_bytes()))


def _pairs(items: list[list[str]]) -> list[Pair]:
    return [(text, label) for text, label in items]


def stream(texts: Texts, size: Size, encode: Callable[[str], Tensor], seed: int) -> Stream:
    """The tasks of one seed."""
    generator = random.Random(seed)
    groups = _groups(texts, size.tasks, generator)
    labels = {name: i for i, name in enumerate(name for group in groups for name in group)}
    train, test = _by_class(texts.train, labels), _by_class(texts.test, labels)
    for pairs in train.values():  # in the order of the labels, so that the seed decides
        generator.shuffle(pairs)
    made = Stream(list(labels), [], [], [], [], [])
    for group in groups:
        held = {name: len(train[name]) // 5 for name in group}
        learned = [(t, labels[n]) for n in group for t in train[n][held[n] :][: size.train]]
        generator.shuffle(learned)
        asked = [(t, labels[n]) for n in group for t in test[n][: size.test]]
        made.shown.append(learned)
        made.asked.append(asked)
        made.train.append(_encoded(learned, encode))
        made.test.append(_encoded(asked, encode))
        checked = [(t, labels[n]) for n in group for t in train[n][: held[n]][: size.validation]]
        made.validation.append(_encoded(checked, encode))
    return made


def _groups(texts: Texts, tasks: int, generator: random.Random) -> list[list[str]]:
    """Classes by task: the groups of the data in a random order, or classes dealt out at random."""
    if texts.groups:
        return generator.sample(texts.groups, len(texts.groups))
    names = sorted({label for _, label in texts.train})
    generator.shuffle(names)
    return [[names[i] for i in part.tolist()] for part in torch.arange(len(names)).tensor_split(tasks)]


def _by_class(pairs: list[Pair], labels: dict[str, int]) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {name: [] for name in labels}
    for text, label in pairs:
        made[label].append(text)
    return made


def _encoded(pairs: list[tuple[str, int]], encode: Callable[[str], Tensor]) -> list[Example]:
    return [(encode(text)[:LONGEST], label) for text, label in pairs]
