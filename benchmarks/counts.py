"""The table of counts: FLOPs and bytes per token, and the floor on this CPU and on an H200's data sheet."""

from __future__ import annotations

from collections.abc import Mapping

from nestling.bench import OPS, Shape, cost
from nestling.models.presets import config_of, matched

H200 = {"flops": 989e12, "bandwidth": 4.8e12}  # data sheet: bfloat16, dense; not measured
DIM, HEADS, TOKENS = 256, 4, 2048


def counted() -> dict[str, cost.Cost]:
    """One forward pass per token, at the shapes of the benchmarks."""
    shape = Shape()
    made = {f"op {name}": case.total(shape) for name, case in OPS.items()}
    made["layer: transformer block"] = cost.transformer_block(DIM, TOKENS / 2)
    made["layer: self-modifying"] = cost.self_modifying_titans(DIM, HEADS)
    made["layer: self-modifying x2"] = cost.self_modifying_titans(DIM, HEADS, expansion=2)
    made["layer: self-modifying mlp"] = cost.self_modifying_titans(DIM, HEADS, memory="mlp")
    return made


def models() -> dict[str, tuple[cost.Cost, cost.Cost]]:
    """(reading, training step) per token of the tiny models of equal parameters."""
    made = {}
    for name in ("transformer", "hope", "hope-attention"):
        config = config_of(name)
        config = config if name == "transformer" else matched(config, "transformer")
        read = cost.reading(config, TOKENS / 2)
        made[f"model: {name}, writes off"] = (read, cost.training(config, TOKENS / 2))
        if name != "transformer":
            made[f"model: {name}, writes on"] = (cost.learning(config, TOKENS / 2), cost.training(config, TOKENS / 2))
    return made


def table(machine: Mapping[str, float]) -> str:
    """One line per op, layer and model."""
    lines = [
        "| | KFLOP/token | with backward | bytes/token | FLOP/byte | floor here, µs/token | H200 floor, ns/token |",
        "|---|---|---|---|---|---|---|",
    ]
    both = {name: (c, c.training) for name, c in counted().items()} | models()
    for name, (forward, training) in both.items():
        here = training.floor(machine["flops"], machine["bandwidth"])
        there = training.floor(H200["flops"], H200["bandwidth"], bytes_per_number=2)
        lines.append(
            f"| {name} | {forward.flops / 1e3:,.0f} | {training.flops / 1e3:,.0f} | {4 * forward.moved:,.0f} | "
            f"{forward.intensity():,.0f} | {1e6 * here:,.2f} | {1e9 * there:,.2f} |"
        )
    return "\n".join(lines)
