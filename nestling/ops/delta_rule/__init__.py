"""Delta rule: erase what is stored at k, write v."""

from nestling.ops.delta_rule import chunk, reference

__all__ = ["chunk", "reference"]
