"""Journal: what a run writes down about itself as it goes: metrics.jsonl, a sign of life, a line on the terminal.

Of several ranks only the first keeps one; for the others every method does nothing.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from nestling.train.config import RunConfig
from nestling.train.files import replace_file
from nestling.train.metrics import MetricsFile, cut_back
from nestling.train.progress import Followers
from nestling.train.run_folder import RunFolder

BEAT = 10.0  # seconds between two signs of life


class Journal:
    """Begins after step `done`: later lines of metrics.jsonl, which will be written again, are removed."""

    def __init__(self, run: RunFolder, config: RunConfig, *, done: int, keeps: bool) -> None:
        self.run, self.config, self.done, self.keeps = run, config, done, keeps
        self.open, self.beat = ExitStack(), -BEAT

    def __enter__(self) -> Journal:
        if self.keeps:
            steps, shown = self.config.train.steps, self.config.train.tensorboard
            followers = Followers(self.run.path, steps=steps, done=self.done, tensorboard=shown)
            self.followers = self.open.enter_context(followers)
            self.begin(self.done)
        return self

    def begin(self, done: int) -> None:
        """Write on after step `done`."""
        if self.keeps:
            cut_back(self.run.metrics, done)
            self.metrics = self.open.enter_context(MetricsFile(self.run.metrics))

    def append(self, record: dict[str, Any]) -> None:
        """One line, and a sign of life if it is time. Raises OSError when the disk is full."""
        if self.keeps:
            self.metrics.append(record)
            if time.monotonic() - self.beat >= BEAT:
                self.beat = time.monotonic()
                alive = {"step": record["step"], "time": time.time(), "process": os.getpid()}
                replace_file(self.run.path / "heartbeat.json", json.dumps(alive).encode())

    def sync(self) -> None:
        """Wait until the disk has all lines."""
        if self.keeps:
            self.metrics.sync()

    def show(self, record: dict[str, Any]) -> None:
        """The line on the terminal."""
        if self.keeps:
            self.followers.update(record)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.open.close()
