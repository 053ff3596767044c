"""The paper's toys of section 2, and what each optimizer keeps of a gradient: `python -m recipes.optimizer_toys`.

Writes results/optimizer_toys/<date>-<hardware>.json; `--figure` draws docs/figures/optimizer_toys.png from the newest.
Everything runs in float64 on one thread, in under a minute.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestling import optim
from nestling.evals.record import provenance
from recipes.cells import rounded

RESULTS, FIGURE = Path("results/optimizer_toys"), Path("docs/figures/optimizer_toys.png")
SEEDS = [0, 1, 2, 3, 4]
CONFIG: dict[str, Any] = {
    "landscape": {"k": 10.0, "a": 1.0, "omega": 2.0, "start": [-3.5, 2.0], "below": 1e-6, "most": 20_000},
    "rates": [0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032],
    "momentum": 0.9,
    "tasks": {"dim": 16, "steps": 60, "lr": 0.05, "noise": 0.1},
}
Make = Callable[[list[Tensor], float], torch.optim.Optimizer]
LANDSCAPE: dict[str, Make] = {
    "gradient descent": lambda p, lr: optim.Momentum(p, lr, 0.0),
    "momentum": lambda p, lr: optim.Momentum(p, lr),
    "delta, directional, normalised 0.1": lambda p, lr: optim.DeltaMomentum(p, lr, erase="left"),
    "delta, directional, normalised 0.9": lambda p, lr: optim.DeltaMomentum(p, lr, erase="left", erase_rate=0.9),
    "delta, scalar, clipped min(lr, 0.9/|g|^2)": lambda p, lr: optim.DeltaMomentum(
        p, lr, erase="scalar", erase_rate=lr, normalize=False
    ),
}


def psi(p: Tensor) -> Tensor:
    """(53): r^2 + k (r - theta + a sin(omega r))^2."""
    c = CONFIG["landscape"]
    r, theta = p
    return r**2 + c["k"] * (r - theta + c["a"] * (c["omega"] * r).sin()) ** 2


def descend(make: Make, lr: float) -> Iterator[float]:
    """The landscape's value after each step."""
    p = torch.tensor(CONFIG["landscape"]["start"], dtype=torch.float64, requires_grad=True)
    optimizer = make([p], lr)
    literal = not optimizer.param_groups[0].get("normalize", True)
    while True:
        optimizer.zero_grad()
        value = psi(p)
        yield value.item()
        value.backward()
        if literal:  # keep |alpha - eta |g|^2| below 1, as the public reconstruction does
            optimizer.param_groups[0]["erase_rate"] = min(lr, 0.9 / float(p.grad.square().sum()))  # type: ignore
        optimizer.step()


def landscape() -> dict[str, Any]:
    """Steps until the value stays below a bound for 100 steps, for each rate; None if it never does."""
    below, most = CONFIG["landscape"]["below"], CONFIG["landscape"]["most"]
    found: dict[str, Any] = {}
    for name, make in LANDSCAPE.items():
        steps: dict[str, int | None] = {}
        for lr in CONFIG["rates"]:
            inside, reached = 0, None
            for t, value in zip(range(most), descend(make, lr), strict=False):
                inside = inside + 1 if value < below else 0
                if inside == 100 or not value < 1e6:
                    reached = t - 99 if inside == 100 else None
                    break
            steps[str(lr)] = reached
        curve = [v for _, v in zip(range(1001), descend(make, 0.004), strict=False)][::10]
        found[name] = {"steps": steps, "curve at lr 0.004, every 10 steps": curve}
    return found


TASKS: dict[str, Make] = {
    "Momentum": lambda p, lr: optim.Momentum(p, lr / 10),
    "DeltaMomentum": lambda p, lr: optim.DeltaMomentum(p, lr / 10),
    "Muon": lambda p, lr: optim.Muon(p, lr, weight_decay=0.0),
    "M3, slow period 10": lambda p, lr: optim.M3(p, lr, slow=((10, 0.9, 1.0),), horizon=None, weight_decay=0.0),
}


def orthogonal_tasks(seed: int) -> dict[str, Any]:
    """(45): two regressions on orthogonal inputs. Of what each memory held in the first task's inputs at the switch,
    the part that is left after n steps of the second; and the error of the first task before and after it."""
    made: dict[str, Any] = {}
    for name, make in TASKS.items():
        sizes, errors = two_tasks(make, torch.Generator().manual_seed(seed))
        switch = CONFIG["tasks"]["steps"] - 1
        made[name] = {
            "kept": {key: [v / values[switch] for v in values[switch:]] for key, values in sizes.items()},
            "error of task 1 at its end": errors[switch],
            "error of task 1 after task 2": errors[-1],
        }
    return made


def two_tasks(make: Make, generator: torch.Generator) -> tuple[dict[str, list[float]], list[float]]:
    """After each step: the norm of each memory in the first task's inputs, and the first task's error."""
    dim, steps = CONFIG["tasks"]["dim"], CONFIG["tasks"]["steps"]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    basis, teacher = torch.linalg.qr(randn(dim, dim))[0], randn(dim, dim) / dim**0.5
    W = torch.zeros(dim, dim, dtype=torch.float64, requires_grad=True)
    optimizer = make([W], CONFIG["tasks"]["lr"])
    sizes: dict[str, list[float]] = {}
    errors = []
    first, second = basis.chunk(2, 1)
    for U in [first] * steps + [second] * steps:
        x = randn(32, dim // 2) @ U.T
        y = x @ teacher.T + CONFIG["tasks"]["noise"] * randn(32, dim)
        optimizer.zero_grad()
        (0.5 * (x @ W.T - y).square().sum(-1).mean()).backward()
        optimizer.step()
        for key in ("momentum_buffer", "slow_0"):
            if key in optimizer.state[W]:
                sizes.setdefault(key, []).append((optimizer.state[W][key] @ first).norm().item())
        errors.append(((W.detach() - teacher) @ first).square().sum().item())
    return sizes, errors


def one_gradient() -> dict[str, list[float]]:
    """What is left in the memory of one gradient while others arrive: on the same inputs, or on others."""
    G, other = torch.zeros(2, 4, 4, dtype=torch.float64)
    G[0, 0] = 1.0
    found = {}
    cases: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], str]] = {
        "Momentum": (lambda p: optim.Momentum(p, 0.1), "momentum_buffer"),
        "DeltaMomentum": (lambda p: optim.DeltaMomentum(p, 0.1), "momentum_buffer"),
        "M3, slow memory": (lambda p: optim.M3(p, 0.1, slow=((10, 0.9, 0.5),), horizon=None), "slow_0"),
    }
    for place, column in (("same inputs", 0), ("other inputs", 1)):
        for name, (make, key) in cases.items():
            W = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
            optimizer, left = make([W]), []
            for step in range(60):
                later = torch.zeros_like(W)
                later[1, column] = 1.0
                W.grad = G if step == 0 else later
                optimizer.step()
                left.append(optimizer.state[W][key][0, 0].item())
            found[f"{name}, {place}"] = [v / left[0] for v in left]
    return found


def spectrum() -> dict[str, list[float]]:
    """Singular values of the first step against those of the gradient."""
    sigma = torch.logspace(-3, 0, 24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    found = {"gradient": sigma.tolist()}
    makes: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "Momentum": lambda p: optim.Momentum(p, 1.0),
        "Muon": lambda p: optim.Muon(p, 1.0, weight_decay=0.0),
        "Kronecker": lambda p: optim.PreconditionedMomentum(p, 1.0, preconditioner=optim.Kronecker()),
        "diagonal": lambda p: optim.PreconditionedMomentum(p, 1.0),
    }
    for name, make in makes.items():
        W = torch.zeros(24, 24, dtype=torch.float64, requires_grad=True)
        W.grad = U * sigma @ V.T
        make([W]).step()
        found[name] = (-(U.T @ W.detach() @ V).diagonal()).tolist()
    return found


def fixed_point() -> dict[str, list[float]]:
    """The output on one repeated pair, as a part of its target: the L2 objective of (56) ends at one half."""
    found = {}
    for erase in (0.0, 0.1, 1.0):
        layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(layer.weight)
        x, optimizer, outputs = torch.ones(1, 4, dtype=torch.float64) / 2, optim.DGD(layer, 0.2, erase=erase), []
        for _ in range(40):
            optimizer.zero_grad()
            y = layer(x)
            outputs.append(y.item())
            (0.5 * (y - 1).square().sum()).backward()
            optimizer.step()
        found[f"erase {erase:g}"] = outputs
    return found


def answers() -> dict[str, list[float]]:
    """DeepMomentum's answer along the gradient: to one that returns, and to noise that does not."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    found = {}
    for name, noise in (("a gradient that returns", 0.0), ("half of each", 0.5), ("noise", 1.0)):
        W = torch.zeros(32, 8, dtype=torch.float64, requires_grad=True)
        optimizer, along = optim.DeepMomentum([W], 1.0), []
        for _ in range(200):
            new = torch.randn(32, 8, generator=generator, dtype=torch.float64)
            W.grad = noise**0.5 * new + (1 - noise) ** 0.5 * direction
            before = W.detach().clone()
            optimizer.step()
            along.append(float(((before - W.detach()) * W.grad).sum() / W.grad.square().sum()))
        found[name] = [sum(along[i : i + 10]) / 10 for i in range(0, 200, 10)]
    return found


def run() -> Path:
    """Everything, into one result file."""
    torch.set_num_threads(1)
    metrics = {
        "landscape": landscape(),
        "orthogonal tasks": [orthogonal_tasks(seed) for seed in SEEDS],
        "one gradient": one_gradient(),
        "spectrum": spectrum(),
        "dgd on one pair": fixed_point(),
        "deep momentum": answers(),
    }
    result = {"recipe": "optimizer_toys", "config": CONFIG, **provenance(), "seeds": SEEDS, "metrics": metrics}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{result['date']}-cpu-{platform.machine()}.json"
    path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    return path


def draw() -> Path:
    """Six panels, one for each sort of memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = json.loads(max(RESULTS.glob("*.json")).read_text(encoding="utf-8"))["metrics"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), dpi=80)
    panels: list[tuple[str, dict[str, list[float]], str, float]] = [
        ("what is left of one gradient", metrics["one gradient"], "steps later", 1),
        ("momentum in old inputs, tasks (45), seed 0", tasks_kept(metrics), "steps of the second task", 1),
        ("landscape (53), lr 0.004", curves(metrics["landscape"]), "steps", 10),
        ("DGD on one pair: output / target", metrics["dgd on one pair"], "steps", 1),
        ("DeepMomentum: answer along the gradient", metrics["deep momentum"], "steps", 10),
    ]
    for i, (ax, (title, lines, below, every)) in enumerate(zip(axes.flat, panels, strict=False)):
        for n, (name, values) in enumerate(lines.items()):
            style = "--" if name.endswith("other inputs") else "-"
            ax.plot([every * t for t in range(len(values))], values, style, color=f"C{n % 5}", label=name, lw=1.2)
        ax.set(title=title, xlabel=below, yscale="log" if i == 2 else "linear")
    last = axes.flat[5]
    sigma = metrics["spectrum"].pop("gradient")
    for name, values in metrics["spectrum"].items():
        last.plot(sigma, values, ".-", label=name, lw=1)
    last.set(title="first step by singular value", xlabel="of the gradient", xscale="log", yscale="symlog")
    for ax in axes.flat:
        ax.title.set_fontsize(10)
        ax.legend(fontsize=6.5)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Software": None})
    return FIGURE


def tasks_kept(metrics: Any) -> dict[str, list[float]]:
    """The kept parts of the first seed, one line for each memory."""
    cells = metrics["orthogonal tasks"][0]
    return {f"{n}: {key}": values for n, cell in cells.items() for key, values in cell["kept"].items()}


def curves(cells: Any) -> dict[str, list[float]]:
    """The landscape's curves by optimizer."""
    return {name: cell["curve at lr 0.004, every 10 steps"] for name, cell in cells.items()}


if __name__ == "__main__":
    print(draw() if "--figure" in sys.argv else run())
