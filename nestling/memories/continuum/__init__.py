"""Continuum Memory System: MLP blocks that are written on their own periods, per sequence, by the task loss."""

from .calibrate import calibrate
from .learn import (
    FastState,
    absorb,
    continuum_levels,
    current,
    fast_weights,
    initial_state,
    learn,
    observe,
    once,
    tokens_to_write,
)
from .level import ContinuumLevel, LevelState, Observation
from .linear import Bend, FastLinear, Reading, ahead, checkpointed, reading, untaped
from .matrix import FastMatrix
from .memory import (
    Bends,
    ContinuumMemory,
    ContinuumStack,
    GatedMLP,
    IndependentContinuumMemory,
    NestedContinuumMemory,
    check_periods,
)
from .rules import DIRECTIONS, AdamLike, InnerRule, Momentum, MuonLike

__all__ = [
    "DIRECTIONS",
    "AdamLike",
    "Bend",
    "Bends",
    "ContinuumLevel",
    "ContinuumMemory",
    "ContinuumStack",
    "FastLinear",
    "FastMatrix",
    "FastState",
    "GatedMLP",
    "IndependentContinuumMemory",
    "InnerRule",
    "LevelState",
    "Momentum",
    "MuonLike",
    "NestedContinuumMemory",
    "Observation",
    "Reading",
    "absorb",
    "ahead",
    "calibrate",
    "check_periods",
    "checkpointed",
    "continuum_levels",
    "current",
    "fast_weights",
    "initial_state",
    "learn",
    "observe",
    "once",
    "reading",
    "tokens_to_write",
    "untaped",
]
