"""Checkpoints: a folder `step-N` that appears whole or not at all, is verified before it is used, and holds no pickle.

A checkpoint is a set of named parts; each part is a tree (see core.state) written as `<part>.safetensors` (its tensors)
and `<part>.json` (what stands around them). `manifest.json` has the size and SHA-256 of every file. A checkpoint is
written under a temporary name, every file is synced, and the folder renamed: a kill leaves the old ones untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from nestling.core.state import Tree, flatten, tensors, unflatten
from nestling.train.files import sync_folder, write_file

FORMAT = "nestling-checkpoint-1"
KEPT = 2
PARTS = ("model", "optimizer", "state", "random", "progress", "identity")
Parts = dict[str, Tree]


class DamagedCheckpoint(ValueError):
    """A checkpoint that does not hold what was written."""


def write_checkpoint(folder: Path, step: int, parts: Parts, *, keep: int = KEPT, keep_every: int = 0) -> Path:
    """Write checkpoint `step` below `folder` and retire old ones. Raises OSError and leaves no trace."""
    clear_remains(folder)
    writing, final = folder / f".writing-{step:08d}", folder / f"step-{step:08d}"
    writing.mkdir()
    try:
        manifest = {}
        for name in PARTS:
            for path, content in _files(name, parts[name]):
                write_file(writing / path, content)
                manifest[path] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        described = json.dumps({"format": FORMAT, "step": step, "files": manifest}, indent=1)
        write_file(writing / "manifest.json", described.encode())
        sync_folder(writing)
        os.rename(writing, final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    sync_folder(folder)
    retire(folder, keep=keep, keep_every=keep_every)
    return final


def clear_remains(folder: Path) -> None:
    """Make the folder, and remove what a kill has left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob(".writing-*"), *folder.glob(".removing-*")]:
        shutil.rmtree(leftover)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def retire(folder: Path, *, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep`, and those of steps that `keep_every` divides (0 = none)."""
    for old in checkpoints(folder)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            remove(old)


def remove(path: Path) -> None:
    """Delete a checkpoint; its name goes first, so that a kill leaves none that is half there."""
    going = path.with_name(f".removing-{path.name}")
    os.rename(path, going)
    shutil.rmtree(going)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is neither loaded nor removed nor in the way."""
    number = 0
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    os.rename(path, aside)
    return aside


def read_checkpoint(path: Path, wanted: Sequence[str] = PARTS) -> Parts:
    """The wanted parts of a checkpoint, as fresh tensors on the CPU; every file of it is verified.

    Raises DamagedCheckpoint if a file is missing, cut short or changed; nothing of it is used then.
    """
    content = _verified(path)
    try:
        return {name: _part(content[f"{name}.safetensors"], content[f"{name}.json"]) for name in wanted}
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read: {error}") from error


def read_latest(
    folder: Path, say: Callable[[str], None], read: Callable[[Path], Parts] = read_checkpoint
) -> tuple[Path, Parts] | None:
    """The newest whole checkpoint below a folder, or None if there are none.

    A damaged one is set aside, and said so. Raises DamagedCheckpoint if all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, read(path)
        except DamagedCheckpoint as error:
            say(f"{error}; kept as {set_aside(path).name}, taking the one before")
    if found:
        raise _nothing_whole(folder)
    return None


def is_sharded(path: Path) -> bool:
    """Whether several ranks wrote a checkpoint together (sharded.py)."""
    return (path / "trees.json").is_file()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's weights of a checkpoint."""
    return dict(read_checkpoint(path, ["model"])["model"])


def newest_weights(
    folder: Path, say: Callable[[str], None], read: Callable[[Path], dict[str, Tensor]] = read_weights
) -> dict[str, Tensor] | None:
    """The model's weights in the newest whole checkpoint below a folder, or None if there are none.

    Only looks: the folder stays as it is, and the parts that only training needs may have the form of another version.
    Raises DamagedCheckpoint if all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return read(path)
        except DamagedCheckpoint as error:
            say(f"{error}; taking the one before")
    if found:
        raise _nothing_whole(folder)
    return None


def _nothing_whole(folder: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"every checkpoint in {folder} is damaged; start again in a new run folder")


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model the weights of a checkpoint. Raises ValueError if they are of another architecture."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(
            f"the weights do not fit the model ({first[0].strip()}); use the version of nestling that wrote them"
        ) from error


def _files(name: str, tree: Tree) -> list[tuple[str, bytes]]:
    """The two files of a part. Tensors are copied, since safetensors refuses memory that two of them share."""
    named, skeleton = flatten(tree)
    assert len(named) == sum(1 for _ in tensors(tree)), f"two tensors of part {name!r} have one name"
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in named.items()}
    return [(f"{name}.safetensors", save_tensors(copies)), (f"{name}.json", json.dumps(skeleton).encode())]


def _part(tensor_file: bytes, skeleton: bytes) -> Tree:
    """The tree of two files; every tensor in memory of its own, aligned as torch aligns it."""
    named: dict[str, Tensor] = {key: value.clone() for key, value in load_tensors(tensor_file).items()}
    return unflatten(named, json.loads(skeleton))


def _verified(path: Path) -> dict[str, bytes]:
    """Content of every file by name, equal to what the manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r} is not {FORMAT!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} has no whole manifest.json ({error})") from error
    content = {}
    for name, (size, digest) in files.items():
        if Path(name).name != name or not (path / name).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} is missing")
        content[name] = (path / name).read_bytes()
        if len(content[name]) != size:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} has {len(content[name])} of {size} bytes")
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: the content of {name} changed")
    return content
