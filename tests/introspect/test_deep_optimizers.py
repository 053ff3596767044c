"""What is declared about each optimizer of nestling.optim equals what its state does: counts, periods, half-lives."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nestling
from nestling import optim
from nestling.introspect.deep_optimizers import ENTRIES
from nestling.introspect.describe import described, tensors_of
from nestling.introspect.optimizers import COUNTERS, Description
from nestling.optim import generalised

Make = Callable[[nn.Module], torch.optim.Optimizer]
CASES: dict[str, Make] = {
    "Momentum": lambda m: optim.Momentum(m.parameters(), 0.1, 0.8),
    "Momentum, decay": lambda m: optim.Momentum(m.parameters(), 0.1, 0.0, weight_decay=0.5),
    "Preconditioned, diagonal": lambda m: optim.PreconditionedMomentum(
        m.parameters(), 0.1, preconditioner=optim.Diagonal(beta=0.9), weight_decay=0.5
    ),
    "Preconditioned, Kronecker": lambda m: optim.PreconditionedMomentum(
        m.parameters(), 0.1, preconditioner=optim.Kronecker(period=4, beta=0.9)
    ),
    "Preconditioned, given": lambda m: optim.PreconditionedMomentum(
        m.parameters(), 0.1, preconditioner=optim.Given(torch.sign)
    ),
    "DeltaMomentum": lambda m: optim.DeltaMomentum(m.parameters(), 0.1, weight_decay=0.5),
    "DeltaMomentum, left": lambda m: optim.DeltaMomentum(m.parameters(), 0.1, erase="left"),
    "DeepMomentum": lambda m: optim.DeepMomentum(m.parameters(), 0.1, 0.9, hidden=3, weight_decay=0.5),
    "Generalised": lambda m: optim.Generalised(m.parameters(), 0.1, generalised.muon, momentum=0.8),
    "DGD": lambda m: optim.DGD(m, 0.1),
    "DGD, first order": lambda m: optim.DGD(m, 0.1, exact=False),
    "Muon": lambda m: optim.Muon(list(m.parameters())[:2], 0.1, weight_decay=0.5),
    "M3": lambda m: optim.M3(
        list(m.parameters())[:2], 0.1, slow=((3, 0.9, 0.5), (6, 0.7, 0.5)), weight_decay=0.5, horizon=None
    ),
    "M3, literal": lambda m: optim.M3(list(m.parameters())[:2], 0.1, slow=((3, 0.9, 0.5),), literal=True),
}


class Parameters(nn.Module):
    """Two matrices and a vector."""

    def __init__(self) -> None:
        super().__init__()
        made = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (4, 2), (6,))]
        self.all = nn.ParameterList([nn.Parameter(p) for p in made])


def step(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = scale * torch.randn_like(p)
    optimizer.step()


def grown(name: str, steps: int = 12) -> tuple[nn.Module, torch.optim.Optimizer, Description]:
    module = Parameters()
    optimizer = CASES[name](module)
    for _ in range(steps):
        step(optimizer)
    known = described(optimizer, optimizer.param_groups[0])
    assert known is not None
    return module, optimizer, known


def tensors(optimizer: torch.optim.Optimizer, keys: tuple[str, ...]) -> list[Tensor]:
    return [x for state in optimizer.state.values() for key in keys if key in state for x in tensors_of(state[key])]


def test_every_optimizer_has_an_entry_and_a_case() -> None:
    classes = {c for c in vars(optim).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    classes -= {optim.Optimizer, optim.RuleOptimizer, optim.MultiLevel}  # any rule, any optimizers
    assert {c for c in classes if any(base in ENTRIES for base in c.__mro__)} == classes
    assert {c.__name__ for c in classes if c not in {optim.PreconditionedMomentum}} <= {n.split(",")[0] for n in CASES}


@pytest.mark.parametrize("name", CASES)
def test_declared_counts_are_observed(name: str) -> None:
    module, optimizer, known = grown(name)
    boxes = {box.name.split(".", 1)[1]: box for box in nestling.levels(module, optimizer) if "." in box.name}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    weights = next(box for key, box in boxes.items() if key.endswith("weights"))
    assert (weights.tensors, weights.elements) == (len(held), sum(p.numel() for p in held))
    for memory in known.kept:
        found = tensors(optimizer, memory.keys)
        box = boxes[memory.name]
        assert (box.tensors, box.elements) == (len(found), sum(x.numel() for x in found)), memory.name
        assert box.state_bytes == 8 * box.elements and box.elements > 0
    said = {key for memory in known.kept for key in memory.keys}
    assert {key for s in optimizer.state.values() for key in s if tensors_of(s[key])} - COUNTERS == said


@pytest.mark.parametrize("name", CASES)
def test_memories_are_written_in_their_period(name: str) -> None:
    """Over 12 steps a memory changes 12 / period times, and at steps that lie a period apart."""
    _, optimizer, known = grown(name)
    written: dict[str, list[int]] = {memory.name: [] for memory in known.kept}
    for t in range(12):
        before = {memory.name: [x.clone() for x in tensors(optimizer, memory.keys)] for memory in known.kept}
        step(optimizer, 2.0 + t)
        for memory in known.kept:
            now = tensors(optimizer, memory.keys)
            if any(not torch.equal(x, y) for x, y in zip(before[memory.name], now, strict=True)):
                written[memory.name].append(t)
    for memory in known.kept:
        steps = written[memory.name]
        assert len(steps) == 12 // memory.period, memory.name
        assert {b - a for a, b in zip(steps, steps[1:], strict=False)} == {int(memory.period)}, memory.name


def test_a_horizon_is_said() -> None:
    W = nn.Parameter(torch.randn(3, 3))
    rules = [row.rule for row in nestling.levels(nn.ParameterList([W]), optim.M3([W])) if "slow momentum" in row.name]
    assert rules and all("at first over the last 0.1 of the steps" in rule for rule in rules)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("Deep")])
def test_undisturbed_memories_halve_in_the_declared_time(name: str) -> None:
    """Twelve steps on gradients of zero, a multiple of all periods."""
    _, optimizer, known = grown(name)
    before = {memory.name: [x.clone() for x in tensors(optimizer, memory.keys)] for memory in known.kept}
    for _ in range(12):
        step(optimizer, 0.0)
    for memory in known.kept:
        if memory.half_life == 0:
            continue  # equals something of the last step: what it equals is tested with its optimizer
        kept = 1.0 if memory.half_life is None else 0.5 ** (12 / memory.half_life)
        for x, y in zip(before[memory.name], tensors(optimizer, memory.keys), strict=True):
            torch.testing.assert_close(y, kept * x, rtol=1e-9, atol=1e-12)


def test_a_deep_momentum_returns_to_the_empty_memory_in_the_declared_time() -> None:
    module = Parameters()
    optimizer = optim.DeepMomentum(module.parameters(), 0.1, 0.9, hidden=3)
    for _ in range(12):
        step(optimizer)
    known = described(optimizer, optimizer.param_groups[0])
    for group in optimizer.param_groups:
        group["inner_lr"] = 0.0
    matrix = module.all[0]
    empty = optimizer.empty(matrix.detach())
    away = {n: x - empty[n] for n, x in optimizer.state[matrix]["memory"].items()}
    for _ in range(5):
        step(optimizer)
    for n, x in optimizer.state[matrix]["memory"].items():
        torch.testing.assert_close(x - empty[n], 0.5 ** (5 / known.kept[0].half_life) * away[n], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CASES if "DGD" not in name])
def test_undisturbed_weights_halve_in_the_declared_time(name: str) -> None:
    _, optimizer, known = grown(name, steps=0)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in held]
    step(optimizer, 0.0)
    for p, x in zip(held, before, strict=True):
        torch.testing.assert_close(p.detach(), x * (1.0 if known.half_life is None else 0.5 ** (1 / known.half_life)))


def test_dgd_says_that_its_memory_is_the_layers() -> None:
    layer = nn.Linear(3, 2)
    boxes = nestling.levels(layer, optim.DGD(layer, 0.1))
    (weights,) = [box for box in boxes if box.name == "DGD.weights"]
    assert "x xᵀ" in weights.rule and weights.half_life is None and math.isfinite(weights.period)


def test_a_level_writes_in_its_period_and_collects_in_between() -> None:
    """Written at the declared steps: weights, what the level's optimizer keeps, and what is collected."""
    module = Parameters()
    fast = optim.Momentum([module.all[0]], 0.1, 0.8)
    slow = torch.optim.AdamW([module.all[1]], 0.1, weight_decay=0.5)
    frozen = torch.optim.SGD([module.all[2]], 0.1)
    optimizer = optim.MultiLevel({"fast": (fast, 1), "slow": (slow, 3), "frozen": (frozen, math.inf)})
    for _ in range(6):
        step(optimizer)
    changes = {"weights": 0, "exp_avg": 0}
    for _ in range(6):
        p, state = module.all[1], optimizer.state[module.all[1]]
        before = {"weights": p.detach().clone(), "exp_avg": state["exp_avg"].clone()}
        step(optimizer)
        now = {"weights": p.detach(), "exp_avg": optimizer.state[p]["exp_avg"]}
        changes = {key: changes[key] + (not torch.equal(now[key], before[key])) for key in changes}
    step(optimizer)  # the slow level collects again
    boxes = {box.name: box for box in nestling.levels(module, optimizer)}
    periods = {name: box.period for name, box in boxes.items() if name.startswith("MultiLevel")}
    assert periods["MultiLevel.0.weights"] == periods["MultiLevel.0.momentum"] == 1
    assert periods["MultiLevel.1.weights"] == periods["MultiLevel.1.first moment"] == 3
    assert changes == {"weights": 2, "exp_avg": 2}
    assert periods["MultiLevel.1.collected gradients"] == 1 and periods["MultiLevel.2.weights"] == math.inf
    collected = optimizer.state[module.all[1]]["accumulated"]
    assert boxes["MultiLevel.1.collected gradients"].elements == collected.numel()
    assert "MultiLevel.2.collected gradients" not in boxes
    assert boxes["MultiLevel.1.weights"].half_life == pytest.approx(3 * math.log(2) / -math.log(0.95))
