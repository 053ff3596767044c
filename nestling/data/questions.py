"""Passages with questions, one JSON object a line, as SEAL's copy of SQuAD has them.

passages = read_passages(locate("evals/squad_dev.jsonl.xz", folder))       # title, text, questions with one answer each
chosen = one_per_article(passages, shortest=512, longest=1024)             # so that no two are about the same thing
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.data.text import read_text

SQUAD = "evals/squad_dev.jsonl.xz"


@dataclass(frozen=True)
class Question:
    """A question and its answer, which in SQuAD is a span of the passage."""

    question: str
    answer: str


@dataclass(frozen=True)
class Passage:
    """A paragraph of an article, and what is asked about it."""

    title: str
    text: str
    questions: tuple[Question, ...]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl or .jsonl.xz file. Raises ValueError that names the first line that is none."""
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}); copy the file again") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is no JSON object; give one object a line")
        records.append(record)
    return records


def read_passages(path: str | Path) -> list[Passage]:
    """The passages of a file, in its order. Raises ValueError where one lacks a field."""
    try:
        return [
            Passage(r["title"], r["context"], tuple(Question(q["question"], q["answer"]) for q in r["questions"]))
            for r in read_records(path)
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no passages: {error} is missing; give title, context, questions of question and answer"
        ) from error


def one_per_article(passages: Sequence[Passage], shortest: int, longest: int) -> list[Passage]:
    """Of each article the first passage of `shortest` to `longest` bytes whose questions have two different answers."""
    found: dict[str, Passage] = {}
    for passage in passages:
        different = len({q.answer for q in passage.questions}) > 1
        if shortest <= len(passage.text.encode()) <= longest and different:
            found.setdefault(passage.title, passage)
    return list(found.values())
