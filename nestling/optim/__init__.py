"""Memories of gradients: optimizers as associative memories, drop-in for torch.optim (README.md)."""

from nestling.optim.base import Optimizer, RuleOptimizer
from nestling.optim.dgd import DGD
from nestling.optim.m3 import M3
from nestling.optim.momentum import DeltaMomentum, Momentum, PreconditionedMomentum
from nestling.optim.muon import Muon
from nestling.optim.preconditioners import Diagonal, Given, Kronecker

__all__ = [
    "DGD",
    "M3",
    "DeltaMomentum",
    "Diagonal",
    "Given",
    "Kronecker",
    "Momentum",
    "Muon",
    "Optimizer",
    "PreconditionedMomentum",
    "RuleOptimizer",
]
