"""In-context recall of real text: a document, and then parts of it again that must be continued as it says.

    entries = read_entries(locate(DBPEDIA, folder))                    # title, kind, what it is: of DBpedia
    task = records(part(entries, "test"), tokenizer)
    needle_score(model, task, 100, (97, 128), seed=0)                  # exact answers, and bits per asked token
    needle_score(model, task.without_document(), 100, (97, 128), seed=0)   # the same questions, nothing to recall from

| task | document | asked | after |
|---|---|---|---|
| records | lines `Tree River / about: river in Nunavut`, of several entries | values | their subject and field again |
| cloze | a piece of a Wikipedia paragraph (SQuAD) | answers of its questions | the four words before them again |

`records` is the form of SWDE and FDA (fields of a semi-structured page), `cloze` that of SQuAD in Arora et al. (2024),
who turn its questions into continuations since models that are no chat models do not answer questions. Answers are read
with the right tokens before them, so a value without a wrong token is one that greedy decoding would have said
(containment). Titles go to training, validation and test by a hash, so no article is in two of them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from nestling.data import Passage, Tokenizer, read_records
from nestling.evals.suite import NOTHING, Examples

DBPEDIA = "cl/dbpedia14_10.jsonl.xz"
PARTS = {"test": range(0, 15), "validation": range(15, 30), "training": range(30, 100)}  # percent, by hash of the title
CUE, LONGEST = 4, 5  # words shown again before a cloze, words of an answer at most
_IS = re.compile(r"\b(?:is|was|are|were) (?:an?|the) ([A-Za-z0-9'’ -]+)")

Piece = tuple[str, bool]  # a piece of text, and whether it is asked


@dataclass(frozen=True)
class Entry:
    """An entry of DBpedia: its title without brackets, its class, and the first words of what it is."""

    title: str
    kind: str
    about: str


def read_entries(path: str | Path) -> list[Entry]:
    """The entries of a file whose text says what they are, in two to six words, and whose titles are short."""
    found = []
    for record in read_records(path):
        title = re.sub(r" *\(.*?\)", "", record["title"]).strip()
        said = _IS.search(record["text"])
        words = said.group(1).split()[:6] if said else []
        if len(words) >= 2 and 1 <= len(title.split()) <= 4:
            found.append(Entry(title, record["label"], " ".join(words)))
    return found


Titled = TypeVar("Titled", Entry, Passage)


def part(documents: Sequence[Titled], name: str) -> list[Titled]:
    """Those whose title falls into a part of PARTS. Raises ValueError for another name, or if none does."""
    if name not in PARTS:
        raise ValueError(f"part={name!r} is none of {', '.join(PARTS)}")
    made = [d for d in documents if hashed(d.title) in PARTS[name]]
    if not made:
        raise ValueError(f"none of {len(documents)} documents falls into {name}; give more of them")
    return made


def hashed(title: str) -> int:
    """A number below 100 that is the same in every process."""
    return hashlib.sha256(title.encode()).digest()[0] * 100 // 256


class Recall:
    """What the two tasks share: pieces of text become tokens, of which some are asked.

    Args:
        name, version: of the task. tokenizer: its `vocab_size` is that of the task. draw: makes the pieces of one
            example, the document first, from a source of randomness and a number of tokens that it may have at most.
        document: whether it is shown; which questions are asked does not depend on it.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        draw: Callable[[random.Random, int], list[Piece]],
        version: int = 1,
        document: bool = True,
    ) -> None:
        self.name, self.version, self.tokenizer, self.draw = name, version, tokenizer, draw
        self.vocab_size, self.document = tokenizer.vocab_size, document

    def without_document(self) -> Recall:
        """The same questions with nothing to recall the answers from."""
        name = f"{self.name}, no document"
        return Recall(name, self.tokenizer, self.draw, self.version, document=False)

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` documents with their questions. Raises ValueError where none of such a length is found."""
        rng = random.Random(seed)
        rows = [self.row(rng, lengths) for _ in range(count)]
        tokens = torch.zeros(count, max(len(ids) for ids, _ in rows), dtype=torch.long)
        targets = torch.full_like(tokens, NOTHING)
        for i, (ids, asked) in enumerate(rows):
            tokens[i, : len(ids)] = torch.from_numpy(ids)
            targets[i, : len(ids) - 1] = torch.from_numpy(np.where(asked[1:], ids[1:], NOTHING))
        return Examples(tokens, targets)

    def row(self, rng: random.Random, lengths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and which of them are asked."""
        for _ in range(200):
            pieces = self.draw(rng, lengths[1])
            ids = [self.tokenizer.encode(text) for text, _ in pieces]
            if lengths[0] <= sum(map(len, ids)) <= lengths[1] and any(asked for _, asked in pieces):
                marks = [np.full(len(part), asked) for part, (_, asked) in zip(ids, pieces, strict=True)]
                first = 0 if self.document else 1
                return np.concatenate(ids[first:]), np.concatenate(marks[first:])
        raise ValueError(f"lengths={lengths}: 200 draws gave no document of {self.name} of so many tokens; widen them")


def records(entries: Sequence[Entry], tokenizer: Tokenizer) -> Recall:
    """Lines of entries, as many as there is room for, then all of them again in another order, with the values asked.

    Raises ValueError for fewer than two entries.
    """
    if len(entries) < 2:
        raise ValueError(f"{len(entries)} entries make no document; give at least two")

    def draw(rng: random.Random, most: int) -> list[Piece]:
        lines: dict[str, str] = {}
        used = 0
        while True:
            entry = rng.choice(entries)
            field, value = rng.choice([("kind", entry.kind), ("about", entry.about)])
            key = f"{entry.title} / {field}:"
            used += 2 * len(tokenizer.encode(f"{key} {value}\n"))
            if used + len(tokenizer.encode("\n")) > most:
                break
            lines.setdefault(key, value)
        if len(lines) < 2:  # one line again is no question
            return []
        again = rng.sample(list(lines), len(lines))
        document = "".join(f"{key} {value}\n" for key, value in lines.items())
        asked: list[Piece] = [
            piece for key in again for piece in ((key, False), (f" {lines[key]}", True), ("\n", False))
        ]
        return [(f"{document}\n", False), *asked]

    return Recall("records", tokenizer, draw)


def cloze(passages: Sequence[Passage], tokenizer: Tokenizer) -> Recall:
    """A piece of a passage, then the words before some answers in it again, in another order, with the answers asked.

    Raises ValueError if no passage has an answer that can be asked.
    """
    known = [(p.text, spans(p)) for p in passages]
    known = [(text, found) for text, found in known if found]
    if not known:
        raise ValueError(f"no answer of {len(passages)} passages can be asked; give passages of SQuAD")
    bytes_per_token = mean_bytes([text for text, _ in known[:20]], tokenizer)

    def draw(rng: random.Random, most: int) -> list[Piece]:
        text, found = rng.choice(known)
        start = max(0, rng.choice(found)[0] - rng.randrange(int(most * bytes_per_token / 2)))
        start = text.rfind(" ", 0, start) + 1
        end = text.rfind(" ", 0, start + int(most * bytes_per_token * rng.uniform(0.5, 0.8)))
        inside = [span for span in found if start <= span[0] and span[2] <= end]
        chosen = apart(rng.sample(inside, len(inside)))[:4]
        pieces: list[Piece] = [(f"{text[start:end]}\n", False)]
        for cue, answer, stop in chosen:
            pieces += [(text[cue : answer - 1], False), (text[answer - 1 : stop], True), ("\n", False)]
        return pieces

    return Recall("cloze", tokenizer, draw)


def mean_bytes(texts: Sequence[str], tokenizer: Tokenizer) -> float:
    """Bytes per token."""
    return sum(len(t.encode()) for t in texts) / sum(len(tokenizer.encode(t)) for t in texts)


def spans(passage: Passage) -> list[tuple[int, int, int]]:
    """Of each answer that can be asked: where its cue begins, where it begins, and where it ends.

    Answers of at most LONGEST words that stand once in the passage, after CUE words that stand once as well.
    """
    text, found = passage.text, []
    for answer in dict.fromkeys(q.answer for q in passage.questions):
        start = text.find(answer)
        if len(answer.split()) > LONGEST or start < 1 or text.count(answer) != 1 or text[start - 1] != " ":
            continue
        cue = start - 1
        for _ in range(CUE):
            cue = text.rfind(" ", 0, max(cue, 0))
        if cue >= 0 and text.count(text[cue + 1 : start]) == 1:
            found.append((cue + 1, start, start + len(answer)))
    return found


def apart(chosen: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those that neither overlap an earlier one nor hold its answer in their cue."""
    made: list[tuple[int, int, int]] = []
    for span in chosen:
        if all(span[2] <= other[0] or other[2] <= span[0] for other in made):
            made.append(span)
    return made
