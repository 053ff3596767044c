"""One stream of a million tokens, read in pieces with the state carried, and asked all along from copies of the state.

    python -m recipes.babilong_stream NAME RATE SEED TOKENS [DIR]       # a trained cell of recipes/babilong.py

Every row is a book with the ten facts of a test story scattered over the whole of it. At regular points the question
"where is ...?" is put, for everybody who was seen by then, to a copy of the state: the stream itself goes on as if
nobody had asked. Known then: how far back the fact lies that answers. The process's peak memory is noted on the way.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.bench.measure import forget_peak, resident
from nestling.evals import BABILongTask, Reads, Story
from nestling.evals.haystack import scattered
from nestling.models import State
from recipes.cells import Cell

ROWS, POINTS, PIECE = 2, 32, 4096


@dataclass(frozen=True)
class Seen:
    """Somebody was seen somewhere: the last token of the fact."""

    at: int
    who: str
    where: str


def told(task: BABILongTask, story: Story, tokens: int, rng: random.Random) -> tuple[np.ndarray, list[Seen]]:
    """A text of `tokens` tokens with the facts of a story, and what it tells when."""
    facts = [task.tokenizer.encode(f" {fact}") for fact in story.facts]
    pieces, places = scattered(facts, task.sentences, tokens - sum(map(len, facts)), rng)
    ends = np.cumsum([len(piece) for piece in pieces])
    said = [(fact.split()[0], fact.rstrip(".").split()[-1]) for fact in story.facts]
    return np.concatenate(pieces), [Seen(int(ends[p]), *both) for p, both in zip(places, said, strict=True)]


def known(seen: Sequence[Seen], now: int) -> list[Seen]:
    """The last that `now` tokens tell of everybody."""
    return list({fact.who: fact for fact in seen if fact.at <= now}.values())


@torch.no_grad()
def ask(model: Reads, task: BABILongTask, state: State, rows: Sequence[tuple[int, Seen]]) -> list[bool]:
    """Whether copies of the state's rows know where somebody is. One token asked for: the first of the place."""
    questions = torch.from_numpy(np.stack([task.tokenizer.encode(f" Where is {fact.who}?") for _, fact in rows]))
    logits = model(questions, state.select([row for row, _ in rows]), learn=False).logits[:, -1, : task.vocab_size]
    places = [int(task.tokenizer.encode(f" {fact.where}")[0]) for _, fact in rows]
    return [given == place for given, place in zip(logits.argmax(-1).tolist(), places, strict=True)]


@torch.no_grad()
def read(model: Reads, texts: Tensor, seen: Sequence[Sequence[Seen]], task: BABILongTask, points: int) -> Cell:
    """Answers as [tokens read, tokens since the fact, right], and the process's memory at every point."""
    state: State | None = None
    tokens, asked, memory = texts.shape[1], [], []
    step = tokens // points
    forget_peak()
    for begin in range(0, tokens, step):
        for part in texts[:, begin : begin + step].split(PIECE, 1):
            state = model(part, state, learn=False).state
        now = begin + step
        rows = [(row, fact) for row, facts in enumerate(seen) for fact in known(facts, now)]
        assert state is not None
        if rows:
            right = ask(model, task, state, rows)
            asked += [[now, now - fact.at, int(yes)] for (_, fact), yes in zip(rows, right, strict=True)]
        memory.append({"tokens": now, "peak_bytes": resident(), "state_bytes": state.nbytes})
    return {"asked": asked, "memory": memory}


def main(name: str, lr: str, seed: str, tokens: str, data: str | None = None) -> dict[str, Any]:
    from recipes import babilong

    torch.set_num_threads(1)
    task, rng = babilong.task("test", data), random.Random(babilong.TEST_SEED + int(seed))
    stories = rng.sample(task.stories, ROWS)
    made = [told(task, story, int(tokens), rng) for story in stories]
    texts = torch.from_numpy(np.stack([text for text, _ in made]))
    return read(babilong.load(name, float(lr), int(seed)), texts, [seen for _, seen in made], task, POINTS)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
