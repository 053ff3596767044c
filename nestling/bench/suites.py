"""Ops, layers and models against their baselines: every function measures side by side and returns rows of numbers.

A row says what ran and how fast; `ratio` is the speed over that of the row's baseline in the same rounds. A row whose
gate is red has no speed. `floor` is the part of the time that the counted arithmetic alone would need here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from nestling.bench import cost
from nestling.bench.cases import OPS, OpCase, Shape, made
from nestling.bench.measure import Timing, Work, peak_bytes, side_by_side
from nestling.bench.verify import model_gate, op_gate
from nestling.bench.workloads import LAYERS, layer, layer_work, model, reading_work, text, training_work
from nestling.models import LanguageModel

Row = dict[str, Any]
GATES = {"self-modifying": "self_modifying", "self-modifying x2": "self_modifying"}
GATES |= {"self-modifying mlp": "self_modifying mlp"}


def row(name: str, timing: Timing, tokens: int, counted: cost.Cost, machine: Mapping[str, float], **more: Any) -> Row:
    """Speed of one work, and how far it is from the floor of the machine."""
    speed = tokens / timing.median
    floor = counted.floor(machine["flops"], machine["bandwidth"]) if machine else math.nan
    return {
        "name": name,
        "tokens": tokens,
        "tokens_per_second": speed,
        "flops_per_token": counted.flops,
        "bytes_per_token": 4 * counted.moved,
        "gflops_per_second": counted.flops * speed / 1e9,
        "floor": floor * speed,
        **timing.to_dict(),
        **more,
    }


def against(rows: list[Row], baseline: Row) -> list[Row]:
    """Rows with the ratio of their speed to the baseline's."""
    return [r | {"ratio": r["tokens_per_second"] / baseline["tokens_per_second"]} for r in rows]


def ops(
    machine: Mapping[str, float],
    shape: Shape,
    *,
    loop_tokens: int = 64,
    repeats: int = 3,
    device: str = "cpu",
    cases: Mapping[str, OpCase] = OPS,
) -> list[Row]:
    """Every form of every op, forward and with the backward pass. The ratio is to the reference loop, whose cost per
    token does not depend on the length: it runs on `loop_tokens` of them."""
    return [r for name, case in cases.items() for r in _op(name, case, machine, shape, loop_tokens, repeats, device)]


def _op(
    name: str,
    case: OpCase,
    machine: Mapping[str, float],
    shape: Shape,
    loop_tokens: int,
    repeats: int,
    device: str,
) -> list[Row]:
    dtype = case.dtype(device)
    gates = {f: None if f == "reference" else op_gate(case, f, shape, dtype, device) for f in case.forms(device)}
    rows: list[Row] = [
        {"name": name, "form": f, "shape": asdict(shape), "gate": why} for f, why in gates.items() if why
    ]
    shapes = {
        f: replace(shape, tokens=loop_tokens) if f == "reference" else shape for f, why in gates.items() if not why
    }
    leaves = {f: made(case, s, dtype, device) for f, s in shapes.items()}
    for training in (False, True):
        able = case.forms(device, training=training)
        works = {f: _op_work(case, f, leaves[f], s, training) for f, s in shapes.items() if f in able}
        counted = case.total(shape).training if training else case.total(shape)
        found = [
            row(
                name, t, shapes[f].count, counted, machine, form=f, training=training, shape=asdict(shapes[f]),
                gate="green" if f != "reference" else "reference", peak_bytes=peak_bytes(works[f], device),
            )
            for f, t in side_by_side(works, repeats=repeats, device=device).items()
        ]  # fmt: skip
        rows += against(found, found[0])
    return rows


def _op_work(case: OpCase, form: str, leaves: dict[str, torch.Tensor], shape: Shape, training: bool) -> Work:
    def forward() -> None:
        with torch.no_grad():
            case.run(form, leaves, shape.chunk_size)

    def both() -> None:
        outputs = [y for y in case.run(form, leaves, shape.chunk_size) if y.requires_grad]
        torch.autograd.grad([y.sum() for y in outputs], list(leaves.values()), allow_unused=True)

    return both if training else forward


def layers(
    machine: Mapping[str, float],
    *,
    dim: int = 256,
    heads: int = 4,
    rows: int = 2,
    tokens: int = 2048,
    chunk_size: int = 64,
    names: Sequence[str] = LAYERS,
    repeats: int = 5,
    device: str = "cpu",
) -> list[Row]:
    """Sequence layers against a Transformer block of their width, forward and with the backward pass."""
    small = Shape(rows=1, heads=heads, width=dim // heads, chunk_size=chunk_size)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    gates = {n: op_gate(OPS[GATES[n]], "auto", small, dtype, device) if n in GATES else None for n in names}
    x = torch.randn(rows, tokens, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    modules = {n: layer(n, dim, heads, chunk_size).to(device, dtype) for n, why in gates.items() if not why}
    found: list[Row] = [{"name": n, "gate": why} for n, why in gates.items() if why]
    for training in (False, True):
        works = {n: layer_work(m, x, training=training) for n, m in modules.items()}
        timings = side_by_side(works, repeats=repeats, device=device)
        made_rows = []
        for n, t in timings.items():
            counted = layer_cost(n, dim, heads, tokens, chunk_size)
            made_rows.append(
                row(
                    n, t, rows * tokens, counted.training if training else counted, machine,
                    training=training, chunk_size=chunk_size, length=tokens, gate="green",
                    peak_bytes=peak_bytes(works[n], device),
                )
            )  # fmt: skip
        found += against(made_rows, made_rows[0])
    return found


def layer_cost(name: str, dim: int, heads: int, tokens: int, chunk_size: int = 64) -> cost.Cost:
    """Forward, per token; a causal query sees half the tokens on average."""
    if name == "transformer block":
        return cost.transformer_block(dim, tokens / 2)
    memory = "mlp" if name.endswith("mlp") else "features"
    return cost.self_modifying_titans(dim, heads, chunk_size, 2 if name.endswith("x2") else 1, memory)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "hope": ("hope", {}),
    "hope, static levels": ("hope", {"inner_lr": 0.0}),
    "hope, no segments": ("hope", {"periods": (math.inf,)}),
    "hope-attention": ("hope-attention", {}),
    "hope-attention, static levels": ("hope-attention", {"inner_lr": 0.0}),
}


def models(
    machine: Mapping[str, float],
    *,
    preset: str = "tiny",
    rows: int = 2,
    tokens: int = 2048,
    names: Sequence[str] = tuple(MODELS),
    repeats: int = 3,
    device: str = "cpu",
    **overrides: Any,
) -> list[Row]:
    """Training steps of models of equal parameters; the ratio is to the Transformer. "static levels" cuts the same
    segments and learns nothing from them; "no segments" has one frozen level."""
    built = {n: model(MODELS[n][0], preset, **(MODELS[n][1] | overrides)) for n in names}
    gates = {n: model_gate(m, text(1, 149, m.config.vocab_size)) for n, m in built.items()}
    found: list[Row] = [{"name": n, "gate": why} for n, why in gates.items() if why]
    good = {n: m.to(device) for n, m in built.items() if not gates[n]}
    words = {n: text(rows, tokens, m.config.vocab_size, device) for n, m in good.items()}
    works: dict[str, Work] = {n: training_work(m, words[n]) for n, m in good.items()}
    timings = side_by_side(works, repeats=repeats, device=device)
    made_rows = [
        row(
            n, t, rows * tokens, cost.training(good[n].config, tokens / 2), machine,
            training=True, parameters=good[n].num_parameters(), gate="green", peak_bytes=peak_bytes(works[n], device),
        )
        for n, t in timings.items()
    ]  # fmt: skip
    return found + against(made_rows, made_rows[0])


def by_chunk(machine: Mapping[str, float], sizes: Sequence[int] = (16, 32, 64, 128, 256), **options: Any) -> list[Row]:
    """The self-modifying layer by chunk size, the block beside it each time."""
    names = ("transformer block", "self-modifying")
    return [r for size in sizes for r in layers(machine, chunk_size=size, names=names, **options)]


def readings(
    machine: Mapping[str, float], *, preset: str = "tiny", rows: int = 2, tokens: int = 2048, repeats: int = 3
) -> list[Row]:
    """Reading without a graph, writes off and on; the ratio is to the Transformer."""
    kinds = {
        "transformer": ("transformer", False), "hope, writes off": ("hope", False), "hope, writes on": ("hope", True),
        "hope-attention, writes off": ("hope-attention", False), "hope-attention, writes on": ("hope-attention", True),
    }  # fmt: skip
    built: dict[str, LanguageModel] = {n: model(name, preset) for n, (name, _) in kinds.items()}
    words = text(rows, tokens, built["transformer"].config.vocab_size)
    works: dict[str, Work] = {n: reading_work(built[n], words, learn=learn) for n, (_, learn) in kinds.items()}
    found = []
    for n, t in side_by_side(works, repeats=repeats).items():
        counted = (cost.learning if kinds[n][1] else cost.reading)(built[n].config, tokens / 2)
        found.append(row(n, t, rows * tokens, counted, machine, training=False, gate="green"))
    return against(found, found[0])
