"""What is declared about each optimizer of torch.optim equals what its state does: counts, clock, period, half-life."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nestling
from nestling.introspect.optimizers import COUNTERS, ENTRIES, describe

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
o = torch.optim
CASES: dict[str, Make] = {
    "ASGD": lambda p: o.ASGD(p, lr=0.01),
    "Adadelta": lambda p: o.Adadelta(p, rho=0.8),
    "Adafactor": lambda p: o.Adafactor(p, lr=0.01, weight_decay=0.5),
    "Adagrad": lambda p: o.Adagrad(p, lr=0.1),
    "Adam": lambda p: o.Adam(p, betas=(0.8, 0.95)),
    "Adam, amsgrad": lambda p: o.Adam(p, amsgrad=True),
    "AdamW": lambda p: o.AdamW(p, lr=0.1, weight_decay=0.5),
    "Adamax": lambda p: o.Adamax(p, betas=(0.7, 0.9)),
    "LBFGS": lambda p: o.LBFGS(p, lr=0.1, max_iter=1, history_size=3, tolerance_grad=0, tolerance_change=0),
    "Muon": lambda p: o.Muon(p, lr=0.1, weight_decay=0.5),
    "NAdam": lambda p: o.NAdam(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True),
    "RAdam": lambda p: o.RAdam(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True),
    "RMSprop": lambda p: o.RMSprop(p, alpha=0.9),
    "RMSprop, momentum, centered": lambda p: o.RMSprop(p, alpha=0.9, momentum=0.7, centered=True),
    "Rprop": lambda p: o.Rprop(p, lr=0.1),
    "SGD": lambda p: o.SGD(p, lr=0.1),
    "SGD, decay": lambda p: o.SGD(p, lr=0.1, weight_decay=0.5),
    "SGD, momentum": lambda p: o.SGD(p, lr=0.1, momentum=0.9),
    "SGD, dampening": lambda p: o.SGD(p, lr=0.1, momentum=0.5, dampening=0.5),
    "SGD, nesterov": lambda p: o.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SparseAdam": lambda p: o.SparseAdam(p, betas=(0.8, 0.95)),
}


class TwoMatrices(nn.Module):
    """Parameters that any optimizer takes, 23 numbers in all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))


def step(optimizer: torch.optim.Optimizer, module: nn.Module, scale: float) -> None:
    """One step on gradients drawn anew; all exactly 0 with scale 0."""
    for p in module.parameters():
        gradient = scale * torch.randn_like(p)
        p.grad = gradient.to_sparse(1) if isinstance(optimizer, o.SparseAdam) and scale else gradient
        if isinstance(optimizer, o.SparseAdam) and not scale:  # entries that are there, and zero
            everywhere = torch.arange(len(p))[None]
            p.grad = torch.sparse_coo_tensor(everywhere, gradient, p.shape, check_invariants=False).coalesce()
    if isinstance(optimizer, o.LBFGS):
        optimizer.step(lambda: sum((p**2).sum() for p in module.parameters()))
    else:
        optimizer.step()


def grown(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An optimizer with all its state: after 12 steps on growing gradients."""
    module = TwoMatrices()
    optimizer = CASES[name](list(module.parameters()))
    for i in range(12):
        step(optimizer, module, 1.0 + i)
    return module, optimizer


def tensors(optimizer: torch.optim.Optimizer, key: str) -> list[Tensor]:
    """All tensors that lie under a key of the state."""
    found = [state[key] for state in optimizer.state.values() if key in state]
    return [x for value in found for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor)]


def entry(optimizer: torch.optim.Optimizer):
    steps = max((float(s.get("step", 0)) for s in optimizer.state.values()), default=0.0)
    description = describe(optimizer, optimizer.param_groups[0] | {"steps_taken": steps})
    assert description is not None
    return description


def test_every_optimizer_of_torch_has_an_entry_and_a_case() -> None:
    classes = {c for c in vars(o).values() if inspect.isclass(c) and issubclass(c, o.Optimizer)} - {o.Optimizer}
    assert {c for c in classes if any(base in ENTRIES for base in c.__mro__)} == classes
    assert {c.__name__ for c in classes} == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_declared_counts_are_observed(name: str) -> None:
    module, optimizer = grown(name)
    before_a_step = nestling.levels(module, CASES[name](list(module.parameters())))
    boxes = {box.name.split(".", 1)[1]: box for box in nestling.levels(module, optimizer) if "." in box.name}
    assert boxes.keys() == {box.name.split(".", 1)[1] for box in before_a_step if "." in box.name}
    assert (boxes["weights"].tensors, boxes["weights"].elements) == (2, 23)
    for memory in entry(optimizer).kept:
        found = [x for key in memory.keys for x in tensors(optimizer, key)]
        box = boxes[memory.name]
        assert (box.tensors, box.elements) == (len(found), sum(x.numel() for x in found)), memory.name
        assert box.state_bytes == 8 * box.elements
    known = {key for memory in entry(optimizer).kept for key in memory.keys}
    assert {key for state in optimizer.state.values() for key in state} <= known | COUNTERS


@pytest.mark.parametrize("name", CASES)
def test_every_memory_is_written_once_per_step(name: str) -> None:
    module, optimizer = grown(name)
    boxes = nestling.levels(module, optimizer)
    assert {(box.clock, box.period) for box in boxes} == {("step", 1)}
    keys = [key for memory in entry(optimizer).kept for key in memory.keys]
    for i in range(3):
        before = {key: [x.clone() for x in tensors(optimizer, key)] for key in keys}
        weights = [p.detach().clone() for p in module.parameters()]
        step(optimizer, module, 20.0 + i)
        for key in keys:
            assert any(not torch.equal(x, y) for x, y in zip(before[key], tensors(optimizer, key), strict=True)) or (
                not before[key]
            ), key
        assert all(not torch.equal(x, p) for x, p in zip(weights, module.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, once, at the first sparse gradient
@pytest.mark.parametrize("name", [name for name in CASES if name not in {"LBFGS", "ASGD", "Rprop"}])
def test_memories_halve_in_the_declared_time(name: str) -> None:
    module, optimizer = grown(name)
    kept = entry(optimizer).kept
    before = [[x.clone() for key in memory.keys for x in tensors(optimizer, key)] for memory in kept]
    step(optimizer, module, 0.0)
    for memory, old in zip(kept, before, strict=True):
        factor = 1.0 if memory.half_life is None else 0.5 ** (1 / memory.half_life)
        for x, y in zip(old, [x for key in memory.keys for x in tensors(optimizer, key)], strict=True):
            torch.testing.assert_close(y, factor * x, rtol=1e-9, atol=0)


def test_rprop_forgets_the_last_gradient_at_once() -> None:
    module, optimizer = grown("Rprop")
    last, size = entry(optimizer).kept
    assert (last.half_life, size.half_life) == (0.0, None)
    sizes = [x.clone() for x in tensors(optimizer, "step_size")]
    step(optimizer, module, 0.0)
    assert all((x == 0).all() for x in tensors(optimizer, "prev"))
    assert all(torch.equal(x, y) for x, y in zip(sizes, tensors(optimizer, "step_size"), strict=True))


def test_asgd_average_equals_the_weights_until_t0() -> None:
    module, optimizer = grown("ASGD")
    assert all(torch.equal(x, p) for x, p in zip(tensors(optimizer, "ax"), module.parameters(), strict=True))


@pytest.mark.parametrize("name", ["Adafactor", "AdamW", "Muon", "NAdam", "RAdam", "SGD", "SGD, decay", "Adagrad"])
def test_undisturbed_weights_halve_in_the_declared_time(name: str) -> None:
    module = TwoMatrices()
    optimizer = CASES[name](list(module.parameters()))
    before = [p.detach().clone() for p in module.parameters()]
    declared = entry(optimizer).half_life
    step(optimizer, module, 0.0)
    kept = 1.0 if declared is None else 0.5 ** (1 / declared)
    for x, p in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), kept * x, rtol=1e-12, atol=0)


def test_sgd_decay_through_momentum_halves_in_the_declared_time() -> None:
    module = TwoMatrices()
    optimizer = o.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)
    declared = entry(optimizer).half_life
    assert declared == pytest.approx(math.log(2) / 1e-4, rel=1e-3)
    norms = []
    for _ in range(300):
        step(optimizer, module, 0.0)
        norms.append(float(module.a.detach().norm()))
    assert norms[-1] / norms[-101] == pytest.approx(0.5 ** (100 / declared), rel=1e-5)


def test_adams_two_moments_share_a_level_with_the_weights_they_serve() -> None:
    module = TwoMatrices()
    boxes = nestling.levels(module, o.Adam(module.parameters()))
    (level,) = boxes.by_frequency()
    assert {box.name for box in level} >= {"Adam.first moment", "Adam.second moment", "Adam.weights"}
    half_lives = [box.half_life for box in level if box.name.endswith("moment")]
    assert half_lives == pytest.approx([math.log(2) / -math.log(0.9), math.log(2) / -math.log(0.999)])


def test_groups_are_told_apart() -> None:
    module = TwoMatrices()
    groups = [{"params": [module.a], "momentum": 0.5}, {"params": [module.b], "momentum": 0.0}]
    boxes = nestling.levels(module, o.SGD(groups, lr=0.1))
    elements = {box.name: box.elements for box in boxes if box.name.startswith("SGD")}
    assert elements == {"SGD.0.weights": 15, "SGD.0.momentum": 15, "SGD.1.weights": 8}


class Unknown(torch.optim.Optimizer):
    """Not derived from any known optimizer; keeps one matrix per parameter and a list."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": 1, "shadow": torch.zeros(7), "past": [torch.zeros(2), torch.zeros(3)]}


class KeepsMore(torch.optim.SGD):
    """Derived from a known optimizer, with a memory of its own."""

    def step(self, closure=None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["extra"] = torch.zeros(4)


def test_an_unknown_optimizer_is_described_from_its_state() -> None:
    module = TwoMatrices()
    optimizer = Unknown(module.parameters())
    optimizer.step()
    boxes = {box.name: box for box in nestling.levels(module, optimizer)}
    assert (boxes["Unknown.shadow"].tensors, boxes["Unknown.shadow"].elements) == (2, 14)
    assert (boxes["Unknown.past"].tensors, boxes["Unknown.past"].elements) == (4, 10)
    assert boxes["Unknown.weights"].rule == boxes["Unknown.shadow"].rule == "not known"


def test_a_derived_optimizer_keeps_the_entry_of_its_base() -> None:
    module = TwoMatrices()
    optimizer = KeepsMore(module.parameters(), lr=0.1, momentum=0.9)
    step(optimizer, module, 1.0)
    names = {box.name for box in nestling.levels(module, optimizer)}
    assert {"KeepsMore.momentum", "KeepsMore.extra", "KeepsMore.weights"} <= names
