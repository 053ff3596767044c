"""The arithmetic: each recurrence as the loop that is its equation (reference.py) and in parallel form (chunk.py)."""

from nestling.ops import (
    cms_update,
    cms_write,
    delta_rule,
    dispatch,
    gated_delta_rule,
    linear_attention,
    newton_schulz,
    selective_scan,
    self_modifying,
    titans,
    ttt,
)

__all__ = [
    "cms_update",
    "cms_write",
    "delta_rule",
    "dispatch",
    "gated_delta_rule",
    "linear_attention",
    "newton_schulz",
    "selective_scan",
    "self_modifying",
    "titans",
    "ttt",
]
