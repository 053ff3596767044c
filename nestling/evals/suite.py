"""What the suites share: examples made by seed, a score with its n, seed and version, and its row in a table.

A task makes examples; a model reads them and is asked at some positions for a class. `answers` are argmaxes of the
logits, so any model with `.logits` can be scored. The version of a task changes whenever its examples do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nestling.evals.protocol import Reads

NOTHING = -1  # the target of a position that is not asked


@dataclass(frozen=True)
class Examples:
    """tokens (B, T) int64, rows padded on the right; targets (B, T) int64, `NOTHING` where nothing is asked."""

    tokens: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Tensor | slice) -> Examples:
        return Examples(self.tokens[rows], self.targets[rows])


def one_length(name: str, lengths: tuple[int, int]) -> int:
    """The length, for tasks whose examples all have the same. Raises ValueError for a range."""
    if lengths[0] != lengths[1]:
        raise ValueError(f"lengths={lengths}: all examples of {name} have one length; give the same number twice")
    return lengths[0]


class Task(Protocol):
    """Makes examples: the same ones for the same arguments."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Above every token and every target."""
        ...

    def examples(self, count: int, lengths: tuple[int, int], seed: int) -> Examples:
        """`count` examples whose lengths in tokens lie in lengths[0] ... lengths[1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Score:
    """Right answers of one model on the examples of one task, lengths and seed."""

    task: str
    version: int
    seed: int
    shortest: int
    longest: int  # tokens
    n: int  # examples
    asked: int  # positions
    right: int  # of them
    exact: int  # examples without a wrong answer

    @property
    def accuracy(self) -> float:
        """Share of right positions."""
        return self.right / self.asked

    @property
    def exact_share(self) -> float:
        """Share of examples without a wrong answer."""
        return self.exact / self.n

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"accuracy": self.accuracy, "exact_share": self.exact_share}

    def columns(self) -> dict[str, str]:
        """What a table shows of it."""
        return {
            "task": self.task,
            "tokens": f"{self.shortest}-{self.longest}",
            "examples right, %": f"{100 * self.exact_share:.1f}",
            "positions right, %": f"{100 * self.accuracy:.2f}",
            "n": f"{self.n:,}",
            "positions": f"{self.asked:,}",
            "seed": str(self.seed),
            "version": str(self.version),
        }


class Row(Protocol):
    """What has columns to show, the same for all of a kind."""

    def columns(self) -> dict[str, str]: ...


def table(scores: Sequence[Row]) -> str:
    """Scores of one kind as a markdown table."""
    rows = [score.columns() for score in scores]
    titles = list(rows[0]) if rows else []
    lines = [titles, ["---"] * len(titles), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.no_grad()
def answers(model: Reads, tokens: Tensor, *, classes: int, learn: bool = False, rows: int = 32) -> Tensor:
    """(B, T): the likeliest of the first `classes` classes at every position, `rows` examples read side by side."""
    return torch.cat([model(part, learn=learn).logits[..., :classes].argmax(-1) for part in tokens.split(rows)])


def score(
    model: Reads,
    task: Task,
    count: int,
    lengths: tuple[int, int],
    *,
    seed: int,
    learn: bool = False,
    rows: int = 32,
    device: str | torch.device = "cpu",
) -> Score:
    """Ask a model. `learn`: whether levels with the token clock write while it reads."""
    examples = task.examples(count, lengths, seed)
    given = answers(model, examples.tokens.to(device), classes=task.vocab_size, learn=learn, rows=rows).cpu()
    asked = examples.targets != NOTHING
    right = (given == examples.targets) & asked
    return Score(**counts(task, lengths, seed, asked, right))


def counts(task: Task, lengths: tuple[int, int], seed: int, asked: Tensor, right: Tensor) -> dict[str, Any]:
    """The fields of a `Score`: asked and right (B, T) bool say where something was asked, and where it was answered."""
    return {
        "task": task.name,
        "version": task.version,
        "seed": seed,
        "shortest": lengths[0],
        "longest": lengths[1],
        "n": len(asked),
        "asked": int(asked.sum()),
        "right": int(right.sum()),
        "exact": int((right == asked).all(1).sum()),
    }
