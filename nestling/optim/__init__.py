"""Memories of gradients: optimizers as associative memories, drop-in for torch.optim (README.md)."""

from nestling.optim.base import Optimizer, RuleOptimizer
from nestling.optim.deep_momentum import DeepMomentum
from nestling.optim.dgd import DGD
from nestling.optim.generalised import Form, Generalised
from nestling.optim.groups import Assign, param_groups
from nestling.optim.m3 import M3
from nestling.optim.momentum import DeltaMomentum, Momentum, PreconditionedMomentum
from nestling.optim.multilevel import MultiLevel
from nestling.optim.muon import Muon
from nestling.optim.preconditioners import Diagonal, Given, Kronecker, Preconditioner

__all__ = [
    "DGD",
    "M3",
    "Assign",
    "DeepMomentum",
    "DeltaMomentum",
    "Diagonal",
    "Form",
    "Generalised",
    "Given",
    "Kronecker",
    "Momentum",
    "MultiLevel",
    "Muon",
    "Optimizer",
    "PreconditionedMomentum",
    "Preconditioner",
    "RuleOptimizer",
    "param_groups",
]
