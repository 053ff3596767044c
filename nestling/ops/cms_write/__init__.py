"""The write of a continuum-memory level whose gradient is kept as factors: one pass over what was written before."""

from nestling.ops.cms_write import chunk, reference

__all__ = ["chunk", "reference"]
