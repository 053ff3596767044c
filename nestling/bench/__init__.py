"""Benchmarks: what the arithmetic costs (cost.py), what it takes (suites.py, long.py), and whether it is right.

ceilings()                     # measure.py: FLOP/s and bytes/s of this machine
ops(machine, Shape())          # suites.py: every form of every op against its reference, behind the gate of verify.py
layers(machine), models(...)   # suites.py: side by side with a Transformer block, a Transformer of equal parameters
lengths(), decoding(), stream(), long_step()      # long.py
steps()                        # optimizers.py: our optimizers beside torch's
render(rows, "ops")            # table.py

Imports below: ops, optim, memories, models, testing. The repository's benchmarks/ adds rivals, results and plots.
"""

from nestling.bench import cost
from nestling.bench.cases import OPS, OpCase, Shape, chosen
from nestling.bench.long import decoding, lengths, long_step, slopes, stream
from nestling.bench.measure import Timing, ceilings, peak_bytes, side_by_side, threads
from nestling.bench.optimizers import STEPS, StepCase, steps
from nestling.bench.suites import by_chunk, layers, models, ops, readings
from nestling.bench.table import render
from nestling.bench.verify import model_gate, op_gate

__all__ = [
    "OPS",
    "STEPS",
    "OpCase",
    "Shape",
    "StepCase",
    "Timing",
    "by_chunk",
    "ceilings",
    "chosen",
    "cost",
    "decoding",
    "layers",
    "lengths",
    "long_step",
    "model_gate",
    "models",
    "op_gate",
    "ops",
    "peak_bytes",
    "readings",
    "render",
    "side_by_side",
    "slopes",
    "steps",
    "stream",
    "threads",
]
