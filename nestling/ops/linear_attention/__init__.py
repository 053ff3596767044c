"""Linear attention with optional decay: M <- alpha M + k v^T, o = M^T q."""

from nestling.ops.linear_attention import chunk, reference

__all__ = ["chunk", "reference"]
