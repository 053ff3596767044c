"""Needles in a haystack: sentences with a number are hidden in a long text, which is then asked for them (RULER).

    task = NeedleTask(NEEDLES["s-niah-2"], ByteTokenizer(), book)
    needle_score(model, task, 50, (1000, 1024), seed=0)

| name | haystack | keys shown | keys asked | values per key | value |
|---|---|---|---|---|---|
| s-niah-1 | five short sentences, repeated | 1 | 1 | 1 | 7 digits |
| s-niah-2 | a book | 1 | 1 | 1 | 7 digits |
| s-niah-3 | a book | 1 | 1 | 1 | UUID |
| multi-key | a book | 4 | 1 | 1 | 7 digits |
| multi-query | a book | 4 | 4 | 1 | 7 digits |
| multi-value | a book | 1 | 1 | 4 | 7 digits |

Tasks and sentences as in RULER (Hsieh et al. 2024); keys are an adjective and a noun. Values are asked in the order of
the question, with several of one key in the order of the text. An answer is read with the right tokens before it, so
an example without a wrong token is one that greedy decoding would have answered; bits say how near the others were.
"""

from __future__ import annotations

import math
import random
import re
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.data import Tokenizer
from nestling.evals.haystack import scattered
from nestling.evals.protocol import Reads, token_losses
from nestling.evals.suite import NOTHING, Examples, Score, Task, counts

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_ADJECTIVES = (
    "amber ancient bitter bold brave brisk calm clever coastal crimson curious distant dusty eager early faint fierce "
    "gentle golden grand hollow humble icy ivory jolly keen lively lonely misty narrow noble pale patient proud quiet "
    "rapid rustic silent silver smooth solemn steady sunny swift tender velvet vivid wild wooden young"
)
_NOUNS = (
    "anchor apple arrow badger barrel beacon bridge button candle canyon castle cedar clover comet copper cricket "
    "dolphin falcon feather ferry forest fountain garden glacier hammer harbor island jacket kettle ladder lantern "
    "meadow mirror needle orchard otter pebble pepper pillow rabbit ribbon river saddle spider temple thunder tunnel "
    "valley walnut window"
)


@dataclass(frozen=True, kw_only=True)
class Needle:
    """What is hidden and asked."""

    name: str
    keys: int = 1
    asked: int = 1
    values: int = 1  # of each key
    uuids: bool = False
    repeated: bool = False  # the haystack of S-NIAH-1
    version: int = 1


NEEDLES = {
    needle.name: needle
    for needle in (
        Needle(name="s-niah-1", repeated=True),
        Needle(name="s-niah-2"),
        Needle(name="s-niah-3", uuids=True),
        Needle(name="multi-key", keys=4),
        Needle(name="multi-query", keys=4, asked=4),
        Needle(name="multi-value", values=4),
    )
}


class NeedleTask:
    """A needle, a tokenizer, and the text of the haystack: the sentences from a random one on, to exact length."""

    def __init__(self, needle: Needle, tokenizer: Tokenizer, text: str = "") -> None:
        """Raises ValueError for a text without sentences, where the needle needs one."""
        self.needle, self.tokenizer, self.vocab_size = needle, tokenizer, tokenizer.vocab_size
        text = REPEATED if needle.repeated else " ".join(text.split()) + " "
        sentences = [s for s in re.split(r"(?<=[.!?] )", text) if s]
        if len(sentences) < 2:
            raise ValueError(f"text of {len(text)} characters has fewer than two sentences; give a book")
        self.sentences = [tokenizer.encode(s) for s in sentences]

    @property
    def name(self) -> str:
        return self.needle.name

    @property
    def version(self) -> int:
        return self.needle.version

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` texts with question and answer. Raises ValueError if the question alone is longer than that."""
        rng = random.Random(seed)
        rows = [self.row(rng.randint(*lengths), rng) for _ in range(count)]
        tokens = torch.zeros(count, max(len(t) for t, _ in rows), dtype=torch.long)
        targets = torch.full_like(tokens, NOTHING)
        for i, (row, asked) in enumerate(rows):
            tokens[i, : len(row)] = torch.from_numpy(row)
            targets[i, : len(row)] = torch.from_numpy(np.where(asked, np.append(row[1:], 0), NOTHING))
        return Examples(tokens, targets)

    def row(self, length: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (length,), and at which positions the next token is asked."""
        needle, encode = self.needle, self.tokenizer.encode
        kind = "uuid" if needle.uuids else "number"
        words = [rng.sample(known.split(), needle.keys) for known in (_ADJECTIVES, _NOUNS)]
        keys = [f"{adjective} {noun}" for adjective, noun in zip(*words, strict=True)]
        hidden = [(key, new_value(needle, rng)) for key in keys for _ in range(needle.values)]
        rng.shuffle(hidden)
        asked = rng.sample(keys, needle.asked)
        head = encode(
            f"Some special magic {kind}s are hidden within the following text. Make sure to memorize them. "
            f"I will quiz you about the {kind}s afterwards. "
        )
        answers = [encode(f" {value}") for key in asked for shown, value in hidden if shown == key]
        tail = encode(question(kind, asked, several=len(answers) > 1))
        facts = [encode(f"One of the special magic {kind}s for {key} is: {value}. ") for key, value in hidden]
        comma = encode(",")
        spoken = [part for answer in answers for part in (answer, comma)][:-1]

        room = length - sum(map(len, (head, tail, *facts, *spoken)))
        if room < 0:
            raise ValueError(
                f"length={length} of {self.name} is shorter than its question; use at least {length - room}"
            )
        pieces, _ = scattered(facts, self.sentences, room, rng)
        row = np.concatenate([head, *pieces, tail, *spoken])
        marks = np.zeros(length, dtype=bool)
        end = length
        for part in reversed(spoken):
            if part is not comma:
                marks[end - len(part) - 1 : end - 1] = True
            end -= len(part)
        return row, marks


def new_value(needle: Needle, rng: random.Random) -> str:
    """Seven digits, or a random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4)) if needle.uuids else str(rng.randint(10**6, 10**7 - 1))


def question(kind: str, keys: list[str], *, several: bool) -> str:
    """The question, and the beginning of its answer."""
    whose = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if several:
        return (
            f"What are all the special magic {kind}s for {whose} mentioned in the provided text? "
            f"The special magic {kind}s for {whose} mentioned in the provided text are"
        )
    return (
        f"What is the special magic {kind} for {whose} mentioned in the provided text? "
        f"The special magic {kind} for {whose} mentioned in the provided text is"
    )


@dataclass(frozen=True, kw_only=True)
class NeedleScore(Score):
    """With the values: how many were asked, how many are right to their last token, and bits per asked token."""

    values: int
    values_right: int
    bits: float

    @property
    def value_share(self) -> float:
        """RULER's score: share of values."""
        return self.values_right / self.values

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"value_share": self.value_share}

    def columns(self) -> dict[str, str]:
        values = {"values right, %": f"{100 * self.value_share:.1f}", "bits per token": f"{self.bits:.3f}"}
        return super().columns() | values


@torch.no_grad()
def needle_score(
    model: Reads,
    task: Task,
    count: int,
    lengths: tuple[int, int],
    *,
    seed: int,
    learn: bool = False,
    rows: int = 8,
    device: str | torch.device = "cpu",
) -> NeedleScore:
    """Ask a model. `learn`: whether levels with the token clock write while it reads, question and answer included."""
    examples = task.examples(count, lengths, seed)
    asked = examples.targets != NOTHING
    right, nats = torch.zeros_like(asked), 0.0
    for begin in range(0, count, rows):
        part = examples.take(slice(begin, begin + rows))
        logits = model(part.tokens.to(device), learn=learn).logits[..., : task.vocab_size].cpu()
        wanted = part.targets != NOTHING
        nats += token_losses(logits, part.targets.clamp_min(0))[wanted].double().sum().item()
        right[begin : begin + rows] = (logits.argmax(-1) == part.targets) & wanted
    values, wholly = whole_values(asked, right)
    bits = nats / (math.log(2) * int(asked.sum()))
    return NeedleScore(**counts(task, lengths, seed, asked, right), values=values, values_right=wholly, bits=bits)


def whole_values(asked: Tensor, right: Tensor) -> tuple[int, int]:
    """Runs of asked positions in the rows of (B, T), and how many of them are wholly right."""
    before = torch.nn.functional.pad(asked, (1, 0))[:, :-1]
    run = (asked & ~before).flatten().cumsum(0) - 1  # which run a position belongs to
    count = int(run[-1]) + 1
    wrong = torch.zeros(count, dtype=torch.long).scatter_add_(0, run[asked.flatten()], (~right)[asked].long())
    return count, int((wrong == 0).sum())
