"""The one list of models: every test of what all models promise takes them from here."""

import math

from nestling.models.baselines import MEMORIES
from tests.models.tiny import text, tiny

FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.05}
BASELINES = {name: (name, {"window": 5}) for name in (*MEMORIES, "samba")}
FROZEN = {
    "transformer": ("transformer", {}),
    "transformer, window": ("transformer", {"window": 5}),
    **BASELINES,
}
WRITING = {
    "hope-attention": ("hope-attention", FAST),
    "hope-attention, window": ("hope-attention", {**FAST, "window": 6}),
    "hope": ("hope", FAST),
    "momentum": ("hope-attention", {**FAST, "inner_rule": "momentum", "inner_relative": False}),
    "adam": ("hope-attention", {**FAST, "inner_rule": "adam", "inner_decay": 0.1}),
    "erase": ("hope-attention", {"periods": (2, 6), "inner_lr": 0.05, "inner_erase": 0.5}),
    "online": ("hope-attention", {**FAST, "inner_online": True, "reset": "document"}),
    "learned": ("hope-attention", {**FAST, "inner_learned": True}),
    "nested": ("hope-attention", {"periods": (4, 8, 16), "inner_lr": 0.05, "continuum": "nested"}),
    "independent": ("hope-attention", {"periods": (4, 8, 16), "inner_lr": 0.05, "continuum": "independent"}),
}
MODELS = {**FROZEN, **WRITING}


def made(name):
    """The tiny model of a line of the list, in float64."""
    kind, options = MODELS[name]
    model = tiny(kind, **options)
    if name in ("hope-attention", "online"):
        model.calibrate(text(3, 40, seed=9))
    return model
