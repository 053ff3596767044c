"""Self-modifying Titans: memories that generate the keys, values and rates they are written with."""

from nestling.ops.self_modifying import chunk, reference
from nestling.ops.self_modifying.rule import GENERATORS, READ, Rule, kernel_obstacle, memory_names

__all__ = ["GENERATORS", "READ", "Rule", "chunk", "kernel_obstacle", "memory_names", "reference"]
