"""One list of all optimizers, the same checks for each. A new optimizer joins by a line in CASES."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling import optim
from nestling.optim import generalised
from nestling.testing import assert_close

Make = Callable[..., torch.optim.Optimizer]


def with_adamw(make: Make, period: int = 1, lr: float = 5e-3) -> Make:
    """A level for everything that is a matrix, and AdamW for vectors and scalars."""

    def both(model: nn.Module, **more: object) -> torch.optim.Optimizer:
        parts = [[p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False)]
        levels = {
            "matrices": (lambda ps: make(ps, **more), period),
            "vectors": (lambda ps: torch.optim.AdamW(ps, lr, weight_decay=0.0), 1),
        }
        made = {name: (build(ps), n) for (name, (build, n)), ps in zip(levels.items(), parts, strict=True) if ps}
        return optim.MultiLevel(made)

    return both


CASES: dict[str, Make] = {
    "Momentum": lambda model, **more: optim.Momentum(model.parameters(), 0.02, **more),
    "Momentum, nesterov": lambda model, **more: optim.Momentum(model.parameters(), 0.02, nesterov=True, **more),
    "Preconditioned, diagonal": lambda model, **more: optim.PreconditionedMomentum(model.parameters(), 2e-3, **more),
    "Preconditioned, Kronecker": lambda model, **more: optim.PreconditionedMomentum(
        model.parameters(), 2e-3, preconditioner=optim.Kronecker(beta=0.9, period=2), **more
    ),
    "DeltaMomentum, right": lambda model, **more: optim.DeltaMomentum(model.parameters(), 0.02, **more),
    "DeltaMomentum, left": lambda model, **more: optim.DeltaMomentum(model.parameters(), 0.02, erase="left", **more),
    "DeltaMomentum, scalar": lambda model, **more: optim.DeltaMomentum(
        model.parameters(), 0.02, erase="scalar", **more
    ),
    "DGD": lambda model, **more: optim.DGD(model, 0.2, erase=0.01, **more),
    "Muon": with_adamw(lambda params, **more: optim.Muon(params, 0.01, 0.0, **more)),
    "M3": with_adamw(
        lambda params, **more: optim.M3(params, 0.01, slow=[(3, 0.9, 0.2), (7, 0.9, 0.1)], weight_decay=0.0, **more)
    ),
    "MultiLevel, a slow level": with_adamw(lambda params, **more: optim.Momentum(params, 0.1, **more), period=3),
    "DGD, first order": lambda model, **more: optim.DGD(model, 0.2, exact=False, erase=0.01, **more),
    "DeepMomentum": lambda model, **more: optim.DeepMomentum(model.parameters(), 0.3, **more),
    "DeepMomentum, orthogonal": lambda model, **more: optim.DeepMomentum(
        model.parameters(), 0.02, output=generalised.orthogonal, **more
    ),
    "Generalised": lambda model, **more: optim.Generalised(
        model.parameters(), 0.02, generalised.delta_momentum, momentum=0.9, **more
    ),
}
LOOP_ONLY = {name for name in CASES if name.startswith(("DGD", "Deep", "Generalised"))}  # no argument foreach


class Shapes(nn.Module):
    """Parameters of 0 to 4 dimensions, some not contiguous; each has its minimum at 1."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        made = [torch.randn(shape, dtype=dtype) for shape in ((), (5,), (4, 3), (2, 3, 4), (2, 3, 2, 2))]
        made += [torch.randn(3, 6, dtype=dtype).mT, torch.randn(3, 2, 4, dtype=dtype).permute(2, 0, 1)]
        self.all = nn.ParameterList([nn.Parameter(p) for p in made])

    def loss(self) -> torch.Tensor:
        return sum(((p - 1).square().mean() for p in self.all), start=torch.zeros(())) / 2


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1).tanh()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def descend(model: Shapes, optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    return model.loss().item()


@pytest.mark.parametrize("name", CASES)
def test_converges_on_a_quadratic(name: str) -> None:
    model = Shapes()
    before = model.loss().item()
    optimizer = CASES[name](model)
    for group in optimizer.param_groups:
        group["lr"] *= 5
    assert descend(model, optimizer, 200) < 0.05 * before


@pytest.mark.parametrize("name", CASES)
def test_learns_a_small_network(name: str) -> None:
    """The loss on the last batches is less than half of what it was there before training."""
    model = network()
    data = [batch(step) for step in range(280, 300)]
    before = sum(F.mse_loss(model(x), y).item() for x, y in data)
    losses = train(model, CASES[name](model), range(300))
    assert sum(losses[-20:]) < 0.5 * before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_run_goes_on_with_equal_bits(name: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = CASES[name](model)
    train(model, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(7, 15))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(dtype)
    again.load_state_dict(saved["model"])
    restored = CASES[name](again)
    restored.load_state_dict(saved["optimizer"])
    train(again, restored, range(7, 15))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert optimizer.state_dict()["state"].keys() == restored.state_dict()["state"].keys()


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOOP_ONLY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_foreach_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    one = Shapes(dtype)
    other = copy.deepcopy(one)
    for model, foreach in ((one, True), (other, False)):
        descend(model, CASES[name](model, foreach=foreach), 20)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert_close(p, q, rtol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_groups_have_their_own_rates(name: str) -> None:
    model = network()
    optimizer = CASES[name](model)
    frozen = [model[0].weight]
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if all(p is not q for q in frozen)]
    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": frozen, "lr": 0.0})
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(3))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]


@pytest.mark.parametrize("name", CASES)
def test_missing_and_zero_gradients(name: str) -> None:
    """A parameter without gradient stays and keeps nothing; gradients of zero change nothing before a first one."""
    model = Shapes()
    optimizer = CASES[name](model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in list(model.parameters())[1:]:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert list(model.parameters())[0] not in optimizer.state
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_keeps_its_dtype(name: str) -> None:
    model = network(torch.bfloat16)
    losses = train(model, CASES[name](model), range(60))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("name", CASES)
def test_a_closure_is_called_and_its_loss_returned(name: str) -> None:
    model = network()
    optimizer = CASES[name](model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        x, y = batch(0)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    first, second = (optimizer.step(closure).item() for _ in range(2))
    assert second < first


@pytest.mark.parametrize("name", CASES)
def test_gradient_scaling_and_clipping(name: str) -> None:
    """GradScaler unscales before the step, and skips it when a gradient is not finite."""
    model = network(torch.float32)
    optimizer, scaler = CASES[name](model), torch.amp.GradScaler("cpu", init_scale=256.0)
    x, y = batch(0, torch.float32)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(factor * F.mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    plain = copy.deepcopy(model)
    other = CASES[name](plain)
    F.mse_loss(plain(x), y).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    other.step()
    scaled_step(1.0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p, q, rtol=1e-5)
    scaled_step(float("inf"))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p, q, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_written_is_refused(name: str) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex64"):
        CASES[name](model)
    table = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    with pytest.raises(ValueError, match="sparse"):
        optimizer = CASES[name](table)
        table(torch.tensor([1])).sum().backward()
        for _ in range(3):
            optimizer.step()
