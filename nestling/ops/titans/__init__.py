"""Titans: a linear or 2-layer MLP memory written by its surprise, with momentum and forgetting."""

from nestling.ops.titans import chunk, reference

__all__ = ["chunk", "reference"]
