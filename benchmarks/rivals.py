"""Layers of other packages with a memory that is written at test time, beside ours in one run.

    python -m pip install --no-deps --target runs/rivals -r benchmarks/rivals.txt
    python -m benchmarks.run rivals

A forward pass includes the writes; a training pass is forward, backward, and the separate pass that writes where a
package has one. How many parameters a training pass leaves without a gradient is counted, not claimed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestling.bench import peak_bytes, side_by_side
from nestling.bench.workloads import LAYERS, layer

DIM, HEADS, ROWS = 256, 4, 2
FOLDER = Path("runs/rivals")
OURS = "nestling self-modifying"


@dataclass(frozen=True)
class Rival:
    """A layer to be timed.

    Attributes:
        package: name on the index, None for ours. module: what must be importable.
        make: the layer. forward: (layer, x) -> y, writes included. after: what follows a backward pass.
        tokens: per row; so few that a call takes seconds.
        five: whether k, v, eta, alpha and the memory that is read are all written.
    """

    name: str
    package: str | None
    module: str
    make: Callable[[], nn.Module]
    forward: Callable[[Any, Tensor], Tensor]
    tokens: int = 1024
    after: Callable[[Any, Tensor], None] | None = None
    five: bool = False
    repeats: int = 3


def _ours(name: str) -> nn.Module:
    return layer(name, DIM, HEADS)


def _output(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y if isinstance(y, Tensor) else y[0]


def _lucidrains(expansion: float, heads: int) -> nn.Module:
    from titans_pytorch import MemoryMLP, NeuralMemory

    width = DIM // heads
    memory = MemoryMLP(width, depth=2, expansion_factor=expansion)
    return NeuralMemory(dim=DIM, chunk_size=64, heads=heads, dim_head=width, model=memory)


def _nested_learning() -> nn.Module:
    from nested_learning.titan.self_modifying import SelfModifyingTitans, SelfModifyingTitansConfig

    return SelfModifyingTitans(SelfModifyingTitansConfig(dim=DIM, chunk_size_other=64))


def _nested_learning_forward(module: Any, x: Tensor) -> Tensor:
    """Its training pass reads the initial memory and writes afterwards; its reading pass writes as it goes."""
    return module(x) if x.requires_grad else module.forward_with_updates(x, module.init_fast_state())[0]


def _nested_learning_writes(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        module.apply_updates_inplace(x)


def _titans_memory() -> nn.Module:
    from titans import NeuralMemory

    return NeuralMemory(d_model=DIM, d_hidden=DIM, n_layers=2, chunk_size=64)


RIVALS = (
    Rival("transformer block", None, "torch", lambda: _ours("transformer block"), _output),
    *(Rival(f"nestling {n}", None, "torch", partial(_ours, n), _output, five=True) for n in LAYERS[1:]),
    Rival("2-layer memory x4, 1 head", "titans-pytorch", "titans_pytorch", lambda: _lucidrains(4.0, 1), _output),
    Rival("2-layer memory x1, 4 heads", "titans-pytorch", "titans_pytorch", lambda: _lucidrains(1.0, HEADS), _output),
    Rival(
        "self-modifying, chunk 64", "nested-learning", "nested_learning", _nested_learning, _nested_learning_forward,
        tokens=256, after=_nested_learning_writes, five=True, repeats=2,
    ),
    Rival("2-layer memory", "titans-memory", "titans", _titans_memory, _output, tokens=64, repeats=1),
)  # fmt: skip


def installed() -> Iterator[Rival]:
    """The layers that can be imported; the folder that the command above fills is looked into."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    for rival in RIVALS:
        if rival.package is None or find_spec(rival.module):
            yield rival
        else:
            print(f"{rival.package} is not installed: see the head of benchmarks/rivals.txt", file=sys.stderr)


def works(rival: Rival, module: nn.Module) -> Mapping[bool, Callable[[], None]]:
    """By training: one call."""
    x = torch.randn(ROWS, rival.tokens, DIM, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            rival.forward(module, x)

    def train() -> None:
        module.zero_grad(set_to_none=True)
        rival.forward(module, leaf).sum().backward()
        if rival.after is not None:
            rival.after(module, x)

    return {False: forward, True: train}


def compare() -> dict[str, Any]:
    """Rows for every layer that is installed, the ratio of each to the Transformer block, and how often ours is as
    fast as the fastest other package that writes all five memories."""
    torch.manual_seed(0)
    rivals = list(installed())
    modules = {r.name: r.make() for r in rivals}
    rows: list[dict[str, Any]] = []
    for training in (False, True):
        found = [_row(r, modules[r.name], training) for r in rivals]
        base = found[0]["tokens_per_second"]
        rows += [row | {"ratio": row["tokens_per_second"] / base} for row in found]
    return {"rows": rows, "times_the_fastest_of_five": times_the_fastest(rows)}


def _row(rival: Rival, module: nn.Module, training: bool) -> dict[str, Any]:
    work = works(rival, module)[training]
    timing = side_by_side({rival.name: work}, repeats=rival.repeats)[rival.name]
    tokens = ROWS * rival.tokens
    without = [n for n, p in module.named_parameters() if p.grad is None] if training else []
    row = {
        "name": f"{rival.package}: {rival.name}" if rival.package else rival.name,
        "version": version(rival.package) if rival.package else None,
        "training": training,
        "tokens": tokens,
        "tokens_per_second": tokens / timing.median,
        "peak_bytes": peak_bytes(work),
        "five": "yes" if rival.five else "no",
        **timing.to_dict(),
    }
    if training:
        row["without_gradient"] = f"{len(without)} of {len(list(module.parameters()))}"
    return row


def times_the_fastest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our speed over that of the fastest of the others that write all five memories, by pass."""
    made = {}
    for training in (False, True):
        some = [r for r in rows if r["training"] is training and r["five"] == "yes"]
        ours = [r["tokens_per_second"] for r in some if r["name"] == OURS]
        others = [r["tokens_per_second"] for r in some if ":" in r["name"]]
        if ours and others:
            made["training" if training else "forward"] = ours[0] / max(others)
    return made
