"""`nestling bench`: how fast ops, layers and models are on this machine, each beside its baseline, behind a gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from nestling import bench
from nestling.cli.parser import Parser, UsageError, nearest, positive
from nestling.evals import provenance

EPILOG = """\
  nestling bench                        every op: chunk form against the reference loop, behind a gate
  nestling bench models --threads 2     layers against a Transformer block, training steps against Transformer++
  nestling bench models --device cuda   the same in bfloat16 on a GPU
  nestling bench optim                  a step of each optimizer beside AdamW(foreach=True) and torch.optim.Muon
  nestling bench stream                 a million tokens through the tiny Hope (minutes)

Time is process CPU time on a CPU and device time on a GPU, the median of repeats in turn. "ratio" is the speed over
that of the baseline, the first row of its pass; "floor / time" what the counted arithmetic alone would take here.
A form that differs from its reference gets no speed, and the exit code is 1.
"""
Tables = list[tuple[str, list[dict[str, Any]]]]


def run(parser: Parser, arguments: list[str]) -> int:
    """Measure, print; returns 1 if a gate is red."""
    parser.add_argument("suite", nargs="?", default="ops", help=f"one of {', '.join(SUITES)} (default: ops)")
    parser.add_argument("--threads", type=positive, default=1, help="threads inside an operator (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="sizes of seconds: shows the parts, not the speed")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in SUITES:
        raise UsageError(f"unknown suite {arguments[0]!r}{nearest(arguments[0], SUITES)}")
    args = parser.read(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device={args.device}, but torch finds no GPU here; leave it out to measure the CPU")
    with bench.threads(args.threads):
        facts = provenance()
        tables = SUITES[args.suite](args.device, args.quick)
    if args.json:
        print(json.dumps(facts | {"suite": args.suite, "tables": dict(tables)}, indent=2))
    else:
        print(f"{facts['hardware']}; {args.threads} threads; torch {facts['versions']['torch']}")
        for kind, rows in tables:
            print("\n" + bench.render(rows, kind))
    red = [r for _, rows in tables for r in rows if r.get("gate", "green") not in ("green", "reference")]
    return bool(red)


def _machine(device: str, quick: bool) -> dict[str, float]:
    """The ceilings of the CPU; a GPU's are on its data sheet (docs/performance.md)."""
    if device != "cpu":
        return {}
    return bench.ceilings(size=256, numbers=2**20, repeats=2) if quick else bench.ceilings()


def _ops(device: str, quick: bool) -> Tables:
    shape = bench.Shape(rows=1, tokens=16, heads=1, width=8, chunk_size=8) if quick else bench.Shape()
    more: dict[str, Any] = {"loop_tokens": 16, "repeats": 1} if quick else {}
    return [("ops", bench.ops(_machine(device, quick), shape, device=device, **more))]


def _models(device: str, quick: bool) -> Tables:
    machine = _machine(device, quick)
    if not quick:
        return [("layers", bench.layers(machine, device=device)), ("models", bench.models(machine, device=device))]
    small: dict[str, Any] = {"rows": 1, "tokens": 64, "repeats": 1, "device": device}
    layers = bench.layers(machine, dim=32, heads=1, chunk_size=16, **small)
    return [("layers", layers), ("models", bench.models(machine, dim=32, heads=1, depth=1, chunk_size=16, **small))]


def _decode(device: str, quick: bool) -> Tables:
    more: dict[str, Any] = {"contexts": (32, 64), "steps": 4, "repeats": 1, "names": ("transformer",)} if quick else {}
    return [("decode", bench.decoding(device=device, **more))]


def _length(device: str, quick: bool) -> Tables:
    more: dict[str, Any] = {"sizes": (64, 128), "dim": 32, "heads": 1, "repeats": 1} if quick else {}
    return [("length", bench.lengths(device=device, **more))]


def _stream(device: str, quick: bool) -> Tables:
    more: dict[str, Any] = {"tokens": 512, "every": 256, "decode_at": ()} if quick else {}
    found = bench.stream(device=device, **more)
    return [("stream", found["stream"]), ("decode", found["decoding"])]


def _optim(device: str, quick: bool) -> Tables:
    small: dict[str, Any] = {"dim": 16, "depth": 1, "steps": 10, "repeats": 1} if quick else {}
    return [("steps", bench.steps(device=device, **small))]


def _memory(device: str, quick: bool) -> Tables:
    if device != "cpu":
        raise UsageError("memory measures a process on the CPU; on a GPU, models prints peak memory")
    size: dict[str, Any] = {"preset": "tiny", "tokens": 256} if quick else {}
    return [("memory", [bench.long_step(outer=outer, **size) for outer in ("segment", "sequence")])]


SUITES: dict[str, Callable[[str, bool], Tables]] = {
    "ops": _ops,
    "models": _models,
    "decode": _decode,
    "length": _length,
    "stream": _stream,
    "memory": _memory,
    "optim": _optim,
}
