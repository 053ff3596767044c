"""The folder of a run: who may write into it, and what it is a run of.

run.json         config, fingerprints of the data, versions
metrics.jsonl    one line per step
heartbeat.json   the last sign of life
checkpoints/     step-N, the newest ones
"""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nestling.train.checkpoint import (
    Parts,
    checkpoints,
    clear_remains,
    is_sharded,
    read_checkpoint,
    read_latest,
    read_weights,
    set_aside,
    step_of,
)
from nestling.train.config import RunConfig
from nestling.train.config_file import config_to_json, difference, from_dict
from nestling.train.files import replace_file
from nestling.version import __version__

MAY_CHANGE = (  # what changes no number of a step that goes well, rounding apart
    "config.train.checkpoint_every",
    "config.train.keep",
    "config.train.compile",
    "config.train.tensorboard",
    "config.parallel",
    "config.guard",
)


def refuse_difference(theirs: dict[str, Any], mine: dict[str, Any], what: str) -> None:
    """Raise ValueError with every setting in which `what` differs from this run."""
    changed = [line for line in difference(_with_defaults(theirs), mine) if not line.startswith(MAY_CHANGE)]
    if changed:
        raise ValueError(
            f"{what} is of another config or other data: {'; '.join(changed)}; "
            f"resume with the old settings, or start in another folder"
        )


def _with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity of an earlier version, with the settings that have come since at the values that change nothing."""
    try:
        whole = json.loads(config_to_json(from_dict(RunConfig, identity["config"])))
    except (ValueError, KeyError, TypeError):
        return identity
    return {**identity, "config": whole}


def read_any(path: Path) -> Parts:
    """The parts of a checkpoint, whoever wrote it; of one of several ranks those that one process needs."""
    if not is_sharded(path):
        return read_checkpoint(path)
    from nestling.train.sharded import read_sharded  # loads torch.distributed.checkpoint

    return read_sharded(path)


def any_weights(path: Path) -> dict[str, Tensor]:
    """The model's weights of a checkpoint, whoever wrote it."""
    if not is_sharded(path):
        return read_weights(path)
    from nestling.train.sharded import read_sharded, weights_of

    read_sharded(path)  # raises DamagedCheckpoint
    return weights_of(path)


class RunFolder:
    """A run folder, locked while it is open: a second process that wants it gets BlockingIOError.

    `identity` is what must be equal on resume: config and data fingerprints, as plain values. Of several ranks only
    the first opens it (`open`).
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], *, say: Callable[[str], None]) -> None:
        self.path, self.identity, self.say = Path(path), identity, say
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.settings = self.path / "run.json"
        self.lock: Any = None

    def open(self, *, resume: bool, ranks: int = 1) -> None:
        """Raises FileExistsError for a folder in use without `resume`, ValueError for the folder of another run."""
        path = self.path
        if self.used and not resume:
            raise FileExistsError(f"{path} is not empty; go on with it (resume), or choose another folder")
        if self.used and not self.settings.exists():
            raise ValueError(f"{path} has no run.json, so it is not the folder of a run; choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = self._locked()
        try:
            self._agree(ranks)
            clear_remains(self.checkpoints)
        except BaseException:
            self.close()
            raise

    @property
    def used(self) -> bool:
        """Whether anything but the remains of a run that was killed at once is there."""
        return self.path.exists() and any(p.name not in ("lock", "run.json.part") for p in self.path.iterdir())

    def starting_point(self, checkpoint: Path | None, *, trust: bool) -> tuple[Path, Parts] | None:
        """The checkpoint to go on from: `checkpoint`, or the newest whole one; None at the beginning.

        Raises ValueError for a checkpoint outside the run folder unless `trust`, or of another run.
        """
        for path in [checkpoint] if checkpoint else checkpoints(self.checkpoints):
            self._refuse_outside(path, trust)
        if checkpoint is None:
            return read_latest(self.checkpoints, self.say, read_any)
        parts = read_any(checkpoint)
        refuse_difference(parts["identity"], self.identity, f"checkpoint {checkpoint}")
        for newer in checkpoints(self.checkpoints):
            if step_of(newer) > parts["progress"]["step"]:
                self.say(f"{newer.name} is newer than {checkpoint}; kept as {set_aside(newer).name}")
        return checkpoint, parts

    def _refuse_outside(self, checkpoint: Path, trust: bool) -> None:
        if not trust and not checkpoint.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(
                f"checkpoint {checkpoint} lies outside the run folder {self.path}; "
                f"if you know who made it, say so with --trust (trust=True)"
            )

    def _agree(self, ranks: int) -> None:
        """Write run.json, or compare with the one that is there."""
        versions = {
            "nestling": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            **({"ranks": ranks} if ranks > 1 else {}),
        }
        if not self.settings.exists():
            replace_file(self.settings, json.dumps({**self.identity, "versions": versions}, indent=2).encode())
            return
        try:
            theirs = json.loads(self.settings.read_text(encoding="utf-8"))
            before = theirs.pop("versions")
        except (ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{self.settings} is damaged ({error}); choose another folder") from error
        refuse_difference(theirs, self.identity, str(self.path))
        changed = difference(before, versions)
        if changed:
            self.say(f"resumed, but not bit for bit as before: {'; '.join(changed)}")

    def _locked(self) -> Any:
        """An exclusive lock that ends with this process, however it ends."""
        lock = open(self.path / "lock", "w")  # noqa: SIM115, closed in close()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise BlockingIOError(
                f"{self.path} is in use by another process; wait for it, or choose another folder"
            ) from error
        return lock

    def close(self) -> None:
        """Give the lock back."""
        if self.lock is not None:
            self.lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
