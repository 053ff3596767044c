"""Newton-Schulz: the orthogonal factor of a matrix, from products alone."""

from nestling.ops.newton_schulz import batched, reference
from nestling.ops.newton_schulz.reference import CUBIC, QUINTIC

__all__ = ["CUBIC", "QUINTIC", "batched", "reference"]
