"""Memories of tokens: layers for anybody's model, `y, state = layer(x, state=None)`, x (B, T, D).

| layer | memory | objective | rule | period |
|---|---|---|---|---|
| Attention | none: re-solved at every read | weighted L2 regression | closed form | 0 |
| LinearAttention, Retention | matrix | dot product (with decay) | gradient descent | 1 |
| Mamba | matrix whose every number decays at its own rate | dot product with decay | gradient descent | 1 |
| DeltaRule, GatedDeltaRule | matrix | L2 regression (with decay) | gradient descent | 1 |
| TTTMemory | 2-layer MLP or matrix with a norm | L2 regression | gradient descent | chunk |
| TitansMemory | 2-layer MLP | L2 regression | momentum and forgetting | chunk |
| MemoryAsContext, MemoryAsGate, MemoryAsLayer | TitansMemory and Attention | both | both | 0, chunk |
| HierarchicalTitans | two of them, one new in every shard | L2 regression | momentum and forgetting | chunks |
| SelfModifyingTitans | matrices that make their own keys, values, rates | dot product or L2 | DGD | 1, chunk |
| ContinuumMemory and its variants | gated MLPs | task loss | inner rules | chosen |
"""

from nestling.memories.attention import Attention
from nestling.memories.continuum import (
    ContinuumMemory,
    IndependentContinuumMemory,
    InnerRule,
    NestedContinuumMemory,
    fast_weights,
)
from nestling.memories.hebbian import LinearAttention, Retention
from nestling.memories.hierarchical import HierarchicalTitans
from nestling.memories.linear import DeltaRule, GatedDeltaRule
from nestling.memories.mamba import Mamba
from nestling.memories.self_modifying import SelfModifyingTitans
from nestling.memories.titans import TitansMemory
from nestling.memories.titans_context import MemoryAsContext
from nestling.memories.titans_hybrids import MemoryAsGate, MemoryAsLayer
from nestling.memories.ttt import TTTMemory

__all__ = [
    "Attention",
    "ContinuumMemory",
    "DeltaRule",
    "GatedDeltaRule",
    "HierarchicalTitans",
    "IndependentContinuumMemory",
    "InnerRule",
    "LinearAttention",
    "Mamba",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "NestedContinuumMemory",
    "Retention",
    "SelfModifyingTitans",
    "TTTMemory",
    "TitansMemory",
    "fast_weights",
]
