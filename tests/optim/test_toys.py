"""The toys of paper section 2 do what the committed result of recipes.optimizer_toys says, where it is quick."""

import json
from pathlib import Path

import pytest
import torch

from recipes import optimizer_toys as toys

ROOT = Path(__file__).parents[2]


def newest() -> dict:
    return json.loads(max((ROOT / toys.RESULTS).glob("*.json")).read_text(encoding="utf-8"))["metrics"]


@pytest.mark.parametrize("lr", [0.004, 0.012])
def test_momentum_reaches_the_floor_of_the_landscape(lr: float) -> None:
    """(53): as many steps as the committed result has."""
    steps = newest()["landscape"]["momentum"]["steps"][str(lr)]
    values = [v for _, v in zip(range(steps + 1), toys.descend(toys.LANDSCAPE["momentum"], lr), strict=False)]
    below = toys.CONFIG["landscape"]["below"]
    assert values[steps] < below <= values[steps - 1]


def test_momentum_keeps_no_record_of_an_orthogonal_task() -> None:
    """(45): its part in the old inputs fades by 0.9 a step, whatever the new task does."""
    sizes, _ = toys.two_tasks(toys.TASKS["Momentum"], torch.Generator().manual_seed(0))
    switch = toys.CONFIG["tasks"]["steps"] - 1
    kept = torch.tensor(sizes["momentum_buffer"][switch:], dtype=torch.float64) / sizes["momentum_buffer"][switch]
    torch.testing.assert_close(kept, 0.9 ** torch.arange(len(kept), dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_fixed_point_of_dgd_on_one_pair() -> None:
    """(56) regresses W x on u = target - W x: it ends at target / (1 + erase)."""
    for name, outputs in toys.fixed_point().items():
        assert outputs[-1] == pytest.approx(1 / (1 + float(name.split()[1])), abs=1e-3)
