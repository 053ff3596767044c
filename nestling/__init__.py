"""Nestling: Nested Learning in PyTorch (arXiv 2512.24695).

An associative memory is a function with parameters, an inner objective, an update rule and a period. The folders
follow from it, and are loaded when first used:

    core       the idea: memory, objective, rule, level, state; functions of tensors
    ops        the arithmetic: each recurrence as the loop that is its equation, and in parallel form
    memories   memories of tokens: attention, linear, Titans, self-modifying Titans, continuum memory
    models     memories stacked by period: Transformer++, Hope-Attention, Hope
    sessions   one memory per reader: read, chat, save, fork, undo
    hf         the same for pretrained models of transformers, which `import nestling` does not load
    data, train, evals, introspect, cli, demo
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestling.version import __version__

if TYPE_CHECKING:
    from nestling.introspect import levels
    from nestling.memories.continuum import learn
    from nestling.models.state_file import load_state, save_state
    from nestling.sessions import Session

FOLDERS = (
    "cli",
    "core",
    "data",
    "demo",
    "evals",
    "hf",
    "introspect",
    "memories",
    "models",
    "ops",
    "optim",
    "sessions",
    "testing",
    "train",
)
HOME = {
    "Session": "nestling.sessions",
    "learn": "nestling.memories.continuum",
    "levels": "nestling.introspect",
    "load_state": "nestling.models.state_file",
    "save_state": "nestling.models.state_file",
}

__all__ = ["Session", "__version__", "learn", "levels", "load_state", "save_state"]


def __getattr__(name: str) -> Any:
    """Load a folder, or the folder of a public name, when it is first asked for."""
    if name in FOLDERS:
        return import_module(f"nestling.{name}")
    if name in HOME:
        return getattr(import_module(HOME[name]), name)
    raise AttributeError(f"module 'nestling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *FOLDERS, *HOME})
