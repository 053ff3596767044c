"""Selective scan: a state per channel whose decay, input and read the token chooses (Mamba)."""

from nestling.ops.selective_scan import chunk, reference

__all__ = ["chunk", "reference"]
