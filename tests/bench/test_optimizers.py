"""An optimizer whose step is wrong gets no time."""

import pytest
import torch

from nestling import bench, optim
from nestling.bench import optimizers


@pytest.mark.parametrize("name", bench.STEPS)
def test_every_step_passes_its_gate(name: str) -> None:
    assert optimizers.gate(bench.STEPS[name]) is None


class Late(optim.Momentum):
    """Momentum that is off by a thousandth after its first step when it takes several parameters together."""

    def update(self, params, grads, states, group):
        super().update(params, grads, states, group)
        if group["foreach"] is not False and states[0]["step"] > 1:
            params[-1].mul_(1.001)


def test_a_wrong_step_is_named_and_not_timed() -> None:
    wrong = bench.StepCase(lambda params, **more: Late(params, 1e-3, **more), "AdamW")
    rows = bench.steps(dim=8, depth=1, steps=1, repeats=1, cases={"wrong": wrong})
    row = next(r for r in rows if r["name"] == "wrong")
    assert row["gate"].startswith("the change of matrix 0 is off by") and "ratio" not in row
    raising = bench.StepCase(lambda params, **more: optim.M3([*params, torch.nn.Parameter(torch.ones(3))]), "AdamW")
    assert (optimizers.gate(raising) or "").startswith("ValueError: a parameter of shape (3,) is not a matrix")


def test_bytes_of_state_and_ratios() -> None:
    rows = {r["name"]: r for r in bench.steps(dim=8, depth=1, steps=1, repeats=1)}
    kept = {name: rows[name]["bytes_per_parameter"] for name in ("AdamW", "Muon", "M3", "Momentum")}
    assert kept == {"AdamW": 8, "Muon": 4, "M3": 16, "Momentum": 4}
    assert rows["AdamW"]["ratio"] == rows["torch Muon"]["ratio"] == 1
    assert bench.render(list(rows.values()), "steps").startswith("optimizer")
