"""Windowed update of a continuum-memory level: collect for `period` tokens, then write once."""

from nestling.ops.cms_update import chunk, reference

__all__ = ["chunk", "reference"]
