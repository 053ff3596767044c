"""The boxes of any module and any optimizer: what each remembers, by which rule, and how often it is written."""

from nestling.introspect.box import Box, Boxes
from nestling.introspect.describe import levels

__all__ = ["Box", "Boxes", "levels"]
