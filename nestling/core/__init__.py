"""The idea: an associative memory is a function with parameters, an objective, a rule and a period (README.md)."""

from nestling.core import level, memory, objective, rule, state

__all__ = ["level", "memory", "objective", "rule", "state"]
