"""States as safetensors files: equal bits back, bound to the model that wrote them, nothing unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.state import flatten, unflatten
from .state import Carried, State

_FORMAT = "nestling-state-1"


def save_state(state: State, path: str | os.PathLike[str]) -> None:
    """Write a state, with its model's fingerprint. The file appears whole or not at all.

    Raises ValueError if the state's model is gone, so that nothing could be bound to it.
    """
    fingerprint = state.fingerprint if state.model is None else state.model.fingerprint()
    if fingerprint is None:
        raise ValueError("save_state: the model of this state no longer exists; save while the model is alive")
    named, skeleton = flatten(state.tree)
    named = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    metadata = {"format": _FORMAT, "fingerprint": fingerprint, "skeleton": json.dumps(skeleton)}
    try:
        save_file(named, partial, metadata=metadata)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> State:
    """Read a state back, equal bits. The first forward with another model raises ValueError naming both.

    Raises FileNotFoundError, or ValueError if the file is damaged or not a state.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"state file {path} does not exist; write one with nestling.save_state")
    try:
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            metadata = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        skeleton = json.loads(metadata["skeleton"]) if metadata.get("format") == _FORMAT else None
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise ValueError(f"state file {path} is damaged ({error}); use another copy of it") from None
    tree = unflatten(named, skeleton) if skeleton is not None else None
    if not isinstance(tree, Carried):
        raise ValueError(f"{path} is not a nestling state file; write one with nestling.save_state")
    return State(tree, fingerprint=metadata["fingerprint"])
