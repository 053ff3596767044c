"""The arithmetic: each recurrence as the loop that is its equation (reference.py) and in parallel form (chunk.py)."""

from nestling.ops import delta_rule, gated_delta_rule, linear_attention

__all__ = ["delta_rule", "gated_delta_rule", "linear_attention"]
