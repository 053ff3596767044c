"""Gated delta rule: decay, erase what is stored at k, write v."""

from nestling.ops.gated_delta_rule import chunk, reference

__all__ = ["chunk", "reference"]
