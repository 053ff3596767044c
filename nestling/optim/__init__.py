"""Memories of gradients: optimizers as associative memories, drop-in for torch.optim (README.md)."""

from nestling.optim.base import Optimizer, RuleOptimizer

__all__ = ["Optimizer", "RuleOptimizer"]
