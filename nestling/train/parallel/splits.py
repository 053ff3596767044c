"""Which weights of a model `parallel.tensor` splits."""

from __future__ import annotations

from typing import Any

from nestling.core.spread import Split


def splits_of(model: Any, parts: int) -> dict[str, Split]:
    """What of a model is split, by the names of its weights. Raises ValueError if the model cannot be."""
    if not hasattr(model, "splits"):
        raise ValueError(f"parallel.tensor={parts}: {type(model).__name__} does not say how to split it; use 1")
    try:
        found = model.splits(parts)
    except ValueError as error:
        raise ValueError(f"parallel.tensor={parts}: {error}") from error
    return {f"{name}.weight": split for name, split in found.items()}
