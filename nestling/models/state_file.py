"""States as safetensors files: equal bits back, bound to the model that wrote them, nothing unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.state import Tree, flatten, unflatten
from .state import Carried, State

_FORMAT = "nestling-state-1"


def save_state(state: State, path: str | os.PathLike[str]) -> None:
    """Write a state, with its model's fingerprint. The file appears whole or not at all.

    Raises ValueError if the state's model is gone, so that nothing could be bound to it.
    """
    fingerprint = state.fingerprint if state.model is None else state.model.fingerprint()
    if fingerprint is None:
        raise ValueError("save_state: the model of this state no longer exists; save while the model is alive")
    write_tree(state.tree, path, kind=_FORMAT, about={"fingerprint": fingerprint})


def load_state(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> State:
    """Read a state back, equal bits. The first forward with another model raises ValueError naming both.

    Raises FileNotFoundError, or ValueError if the file is damaged or not a state.
    """
    tree, about = read_tree(path, kind=_FORMAT, what="state", writer="nestling.save_state", map_location=map_location)
    if not isinstance(tree, Carried) or "fingerprint" not in about:
        raise ValueError(f"{path} holds no state of a model; write one with nestling.save_state")
    return State(tree, fingerprint=about["fingerprint"])


def write_tree(tree: Tree, path: str | os.PathLike[str], *, kind: str, about: dict[str, str]) -> None:
    """Write a state tree as a safetensors file that says what `kind` it is. It appears whole or not at all."""
    named, skeleton = flatten(tree)
    named = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    shape = json.dumps(skeleton)
    metadata = about | {"format": kind, "skeleton": shape, "sha256": _digest(named, shape)}
    try:
        save_file(named, partial, metadata=metadata)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_tree(
    path: str | os.PathLike[str], *, kind: str, what: str, writer: str, map_location: torch.device | str
) -> tuple[Tree, dict[str, str]]:
    """The tree of a file of that `kind`, and what it says about itself.

    Raises FileNotFoundError, or ValueError if the file is damaged or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} file {path} does not exist; write one with {writer}")
    try:
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            metadata = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what} file {path} is damaged ({error}); use another copy of it") from None
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is not a nestling {what} file; write one with {writer}")
    try:
        if metadata["sha256"] != _digest(named, metadata["skeleton"]):
            raise ValueError("its checksum differs")
        return unflatten(named, json.loads(metadata["skeleton"])), metadata
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{what} file {path} is damaged ({error}); use another copy of it") from None


def _digest(named: dict[str, torch.Tensor], skeleton: str) -> str:
    """A checksum of what a file holds: safetensors itself would not notice a flipped bit."""
    digest = hashlib.sha256(skeleton.encode())
    for name in sorted(named):
        digest.update(name.encode())
        digest.update(named[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
