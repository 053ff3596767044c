"""BABILong: the facts of a bAbI story, in order, between sentences of a book; a question at the end, one word to say.

    stories = read_stories(archive, "qa1", "test")
    task = BABILongTask("qa1", stories, tokenizer, book)
    babilong_score(model, task, 50, (4096, 4096), seed=0)

Kuratov et al. 2024 (arXiv 2406.10149) on the tasks of Weston et al. 2015 (arXiv 1502.05698): qa1 asks where somebody
went last, qa2 and qa3 where a thing is, or was, by two and three facts, qa4 and qa5 for one of two and three arguments
of a relation. Length 0 is the story alone. An answer counts if greedy decoding gives it to the last token; bits say
how near the others were. Lengths are exact, in tokens; what is read goes through the model in pieces, state carried.
"""

from __future__ import annotations

import math
import random
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nestling.data import Tokenizer
from nestling.evals.haystack import scattered
from nestling.evals.protocol import Reads, token_losses
from nestling.evals.suite import NOTHING, Examples, Score, Task, counts
from nestling.models import State

BABILONG = {
    "qa1": "qa1_single-supporting-fact",
    "qa2": "qa2_two-supporting-facts",
    "qa3": "qa3_three-supporting-facts",
    "qa4": "qa4_two-arg-relations",
    "qa5": "qa5_three-arg-relations",
}
PIECE = 4096  # tokens of one call


@dataclass(frozen=True)
class Question:
    """A question, its one word, and how many facts of the story stand before it."""

    text: str
    answer: str
    facts: int


@dataclass(frozen=True)
class Story:
    """Facts in order, and what is asked in between."""

    facts: tuple[str, ...]
    questions: tuple[Question, ...]


def parse_stories(text: str) -> list[Story]:
    """Stories of a text in the format of bAbI: `id fact`, and `id question<TAB>answer<TAB>ids`; id 1 begins one."""
    made: list[Story] = []
    facts: list[str] = []
    questions: list[Question] = []
    for number, line in re.findall(r"^(\d+) (.*\S) *$", text, re.MULTILINE):
        if number == "1" and facts:
            made.append(Story(tuple(facts), tuple(questions)))
            facts, questions = [], []
        asked, *answer = line.split("\t")
        if answer:
            questions.append(Question(asked.strip(), answer[0], len(facts)))
        else:
            facts.append(asked)
    return [*made, Story(tuple(facts), tuple(questions))]


def read_stories(archive: Path, name: str, part: Literal["train", "test"]) -> list[Story]:
    """The stories of a task in an archive of bAbI 1.2: of the 10k training set, or the first half of the test set.

    Raises ValueError for a name that is none of `BABILONG`. qa3 has the 1k training set only.
    """
    if name not in BABILONG:
        raise ValueError(f"name={name!r} is no task of BABILong; use one of {', '.join(BABILONG)}")
    folder = "en-10k" if part == "train" and name != "qa3" else "en"
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"{folder}/{BABILONG[name]}_{'train' if part == 'train' else 'test_a'}.txt")
        assert file is not None
        return parse_stories(file.read().decode("utf-8"))


class BABILongTask:
    """Stories of one task, a tokenizer, and the book they are hidden in."""

    version = 1

    def __init__(self, name: str, stories: Sequence[Story], tokenizer: Tokenizer, book: str) -> None:
        """Raises ValueError for a text without sentences."""
        self.name, self.stories, self.tokenizer, self.vocab_size = name, stories, tokenizer, tokenizer.vocab_size
        self.items = [(story, question) for story in stories for question in story.questions]
        sentences = re.split(r"(?<=[.!?])(?= )", " " + " ".join(book.split()))
        if len(sentences) < 2:
            raise ValueError(f"book of {len(book)} characters has fewer than two sentences; give a whole one")
        self.sentences = [tokenizer.encode(s) for s in sentences]

    @property
    def chance(self) -> float:
        """Share of the questions that the commonest answer answers."""
        return Counter(q.answer for _, q in self.items).most_common(1)[0][1] / len(self.items)

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` different questions (all again where there are no more), each after its facts and alone.

        Raises ValueError for a length, other than 0, that its facts do not fit in.
        """
        rng = random.Random(seed)
        rows = []
        for i in range(count):
            if i % len(self.items) == 0:
                order = rng.sample(self.items, len(self.items))
            story, question = order[i % len(self.items)]
            last = Story(story.facts[: question.facts], (question,))
            rows.append(self.row(last, rng.randint(*lengths), rng))
        return padded(rows)

    def lessons(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` whole stories with all of their questions, each where the story asks it: more to learn per token."""
        rng = random.Random(seed)
        return padded([self.row(rng.choice(self.stories), rng.randint(*lengths), rng) for _ in range(count)])

    def row(self, story: Story, length: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and what is asked at each. Facts lie anywhere, a question stands behind the last of its facts."""
        encode = self.tokenizer.encode
        facts = [encode(f" {fact}") for fact in story.facts]
        asked = [[encode(f" {q.text}"), encode(f" {q.answer}")] for q in story.questions]
        room = length - sum(map(len, facts)) - sum(len(part) for parts in asked for part in parts)
        if length and room < 0:
            raise ValueError(
                f"length={length} of {self.name} is shorter than its facts; use 0 or at least {length - room}"
            )
        pieces, places = scattered(facts, self.sentences, max(0, room), rng)
        marks = [np.zeros(len(piece), dtype=bool) for piece in pieces]
        ends = [places[q.facts] for q in story.questions if q.facts < len(facts)]  # a question stands before that fact
        ends += [len(pieces)] * (len(asked) - len(ends))
        for end, parts in reversed(list(zip(ends, asked, strict=True))):
            pieces[end:end] = parts
            marks[end:end] = [np.zeros(len(parts[0]), dtype=bool), np.ones(len(parts[1]), dtype=bool)]
        row, spoken = np.concatenate(pieces), np.concatenate(marks)
        return row, np.append(np.where(spoken, row, NOTHING)[1:], NOTHING)


def padded(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Examples:
    """Rows of tokens and targets as examples."""
    tokens = torch.zeros(len(rows), max(len(t) for t, _ in rows), dtype=torch.long)
    targets = torch.full_like(tokens, NOTHING)
    for i, (row, asked) in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row)
        targets[i, : len(row)] = torch.from_numpy(asked)
    return Examples(tokens, targets)


@dataclass(frozen=True, kw_only=True)
class BABILongScore(Score):
    """With bits per answer."""

    bits: float

    def columns(self) -> dict[str, str]:
        return super().columns() | {"bits per answer": f"{self.bits:.3f}"}


@torch.no_grad()
def babilong_score(
    model: Reads,
    task: Task,
    count: int,
    lengths: tuple[int, int],
    *,
    seed: int,
    learn: bool = False,
    rows: int = 16,
    piece: int = PIECE,
    device: str | torch.device = "cpu",
) -> BABILongScore:
    """Ask a model. `learn`: whether levels with the token clock write while it reads."""
    examples = task.examples(count, lengths, seed)
    asked = examples.targets != NOTHING
    right, nats = torch.zeros_like(asked), 0.0
    for begin in range(0, count, rows):
        part = slice(begin, begin + rows)
        logits = asked_logits(model, examples.take(part), learn=learn, piece=piece, device=device)
        targets = examples.targets[part][asked[part]]
        nats += token_losses(logits[None, :, : task.vocab_size], targets[None]).double().sum().item()
        right[part][asked[part]] = logits[:, : task.vocab_size].argmax(-1) == targets
    return BABILongScore(**counts(task, lengths, seed, asked, right), bits=nats / (math.log(2) * count))


def asked_logits(
    model: Reads, examples: Examples, *, learn: bool, piece: int, device: str | torch.device = "cpu"
) -> Tensor:
    """(positions, V): the logits where something is asked, row after row; read `piece` tokens at a time."""
    state: State | None = None
    found, places = [], []
    for begin in range(0, examples.tokens.shape[1], piece):
        part = slice(begin, begin + piece)
        out = model(examples.tokens[:, part].to(device), state, learn=learn)
        state = out.state
        asked = (examples.targets[:, part] != NOTHING).nonzero()
        found.append(out.logits[asked[:, 0], asked[:, 1]].cpu())
        places.append(asked[:, 0] * examples.tokens.shape[1] + asked[:, 1] + begin)
    return torch.cat(found)[torch.cat(places).argsort()]
