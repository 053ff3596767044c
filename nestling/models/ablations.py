"""Hope with one thing changed: the ablations of the paper's Table 6 and the levels of its Figure 7, as overrides.

    build("hope", **{**sizes, **ABLATIONS["without DGD"]})

Every entry changes what its name says and nothing else (tests/models/test_ablations.py); `match` makes the parameters
equal. Two rows of Table 6 are turned round, because the library's Hope starts from the other side: its queries are
not adaptive, as the paper's text has them, so that "adaptive q" adds what Table 6 removes; and nothing in it has
momentum, which equations (88) and (96) do not have either, so that "momentum" adds it to the writes of the levels.
"""

from __future__ import annotations

import math
from typing import Any

from .config import ModelConfig

LOWEST = (64, 256, 1_024)  # shortest periods, in tokens: what a segment, and so the cost of learning, goes by
COUNTS = (1, 2, 3, 4)


def cms(levels: int, lowest: int) -> dict[str, Any]:
    """`levels` levels that write, the fastest every `lowest` tokens and each next one a quarter as often."""
    return {"periods": tuple(float(lowest * 4**i) for i in range(levels))}


def without(*names: str) -> dict[str, Any]:
    """What these memories generate becomes a fixed map."""
    return {"adaptive": tuple(name for name in ModelConfig(name="hope").adaptive if name not in names)}


ABLATIONS: dict[str, dict[str, Any]] = {
    "Hope": {},
    "without DGD": {"dgd": False},
    "without decay": {"decay": False},
    "without CMS": {"periods": (math.inf,)},
    "without adaptive k": without("k"),
    "without adaptive v": without("v"),
    "without adaptive eta": without("eta"),
    "without adaptive alpha": without("alpha"),
    "without self-modification": without("k", "v", "eta", "alpha"),
    "adaptive q": {"adaptive": ("q", *ModelConfig(name="hope").adaptive)},
    "momentum": {"inner_rule": "momentum"},
}
LEVELS: dict[str, dict[str, Any]] = {
    f"{count} {'level' if count == 1 else 'levels'}, lowest period {lowest}": cms(count, lowest)
    for lowest in LOWEST
    for count in COUNTS
}
