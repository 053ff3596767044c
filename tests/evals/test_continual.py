"""The numbers of a run over tasks, against small matrices worked out by hand."""

from __future__ import annotations

import pytest

from nestling.evals.continual import continual

ACCURACY = [
    [0.9, 0.2, 0.1],
    [0.95, 0.8, 0.1],  # the second task helps the first
    [0.5, 0.6, 0.7],
]


def test_accuracies_by_hand() -> None:
    made = continual(ACCURACY)
    assert made.average == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert made.learned == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert made.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)  # from the best so far
    assert made.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)  # from right after learning


def test_forward_transfer_is_what_earlier_tasks_gave_a_task_before_its_turn() -> None:
    assert continual(ACCURACY).forward_transfer is None
    made = continual(ACCURACY, initial=[0.0, 0.1, 0.3])
    assert made.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.1 - 0.3)) / 2)
    with pytest.raises(ValueError, match="one per task"):
        continual(ACCURACY, initial=[0.0])


def test_losses_count_what_was_lost_as_positive() -> None:
    made = continual([[-v for v in row] for row in ACCURACY], smaller_is_better=True)
    same = continual(ACCURACY)
    assert made.forgetting == pytest.approx(same.forgetting)
    assert made.backward_transfer == pytest.approx(-same.backward_transfer)
    assert made.average == pytest.approx(-same.average)


def test_scores_of_tasks_not_learned_yet_count_nowhere() -> None:
    other = [[0.9, 5.0, 7.0], [0.95, 0.8, -3.0], ACCURACY[2]]
    assert continual(other) == continual(ACCURACY)


def test_a_task_that_improves_has_negative_forgetting() -> None:
    assert continual([[0.5, 0.1], [0.7, 0.6]]).forgetting == pytest.approx(-0.2)


@pytest.mark.parametrize("scores", [[], [[0.5]], [[0.5, 0.4], [0.3]], [[0.5, 0.4]]])
def test_other_shapes_are_refused(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="T rows of T >= 2"):
        continual(scores)
