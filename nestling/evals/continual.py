"""Learning tasks one after the other: what is learned, what is left of it at the end, what was lost on the way.

    scores[i][j] is the score on task j after learning task i, T rows and T columns:
    average             mean of the last row
    learned             mean of the diagonal: each task right after it was learned
    forgetting          mean over all tasks but the last of: its best score before the last task, minus its last
    backward_transfer   mean over the same tasks of: last score minus the score right after learning
    forward_transfer    mean over all tasks but the first of: score just before it is learned, minus its first score

Higher scores are better (accuracy) unless said otherwise (loss); forgetting counts what was lost, in either case
positive. Definitions of Chaudhry et al. 2018 (forgetting) and Lopez-Paz and Ranzato 2017 (transfer; both in units of
the scores, so for a loss a negative number is a gain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum

Scores = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Continual:
    """The numbers of one run over T tasks, in units of its scores; forward transfer if first scores are known."""

    average: float
    learned: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float | None = None

    def to_dict(self) -> dict[str, float]:
        """The numbers that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def continual(scores: Scores, *, smaller_is_better: bool = False, initial: Sequence[float] | None = None) -> Continual:
    """The numbers of a matrix of scores; `initial` are the T scores before the first task.

    Raises ValueError unless the matrix is T x T with T >= 2, and for `initial` of another length.
    """
    tasks = len(scores)
    if tasks < 2 or any(len(row) != tasks for row in scores):
        raise ValueError(
            f"scores has rows of {[len(row) for row in scores]} numbers; give T rows of T >= 2, one after each task"
        )
    if initial is not None and len(initial) != tasks:
        raise ValueError(f"initial has {len(initial)} scores for {tasks} tasks; give one per task")
    sign = -1.0 if smaller_is_better else 1.0
    last, old = scores[-1], range(tasks - 1)
    best = [max(sign * scores[i][j] for i in range(j, tasks - 1)) for j in old]
    return Continual(
        average=mean(last),
        learned=mean([scores[j][j] for j in range(tasks)]),
        forgetting=mean([best[j] - sign * last[j] for j in old]),
        backward_transfer=mean([last[j] - scores[j][j] for j in old]),
        forward_transfer=None if initial is None else mean([scores[j - 1][j] - initial[j] for j in range(1, tasks)]),
    )


def mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
