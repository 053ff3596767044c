"""The line that shows a run going on: rewritten in place on a terminal, else line by line; TensorBoard if asked."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

EVERY = 10.0  # seconds between plain lines
WIDTH = 20  # characters of the bar


class Follower(Protocol):
    """Something that is told every record of metrics.jsonl."""

    def update(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def describe(record: dict[str, Any], steps: int, seconds_left: float) -> str:
    """One line of a record."""
    minutes, seconds = divmod(round(seconds_left), 60)
    held_out = "".join(f"  held-out {name} {value:.4f}" for name, value in record.get("validation", {}).items())
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}{held_out}  lr {record['lr']:.1e}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['peak_memory'] / 2**20:,.0f} MiB  "
        f"writes {record['writes']}  left {minutes}:{seconds:02d}"
    )


class Clock:
    """Time left, from the mean time of the steps since this process began."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.first, self.start = steps, done, time.monotonic()

    def left(self, step: int) -> float:
        """Seconds until the last step."""
        return (time.monotonic() - self.start) / max(1, step - self.first) * (self.steps - step)


class PlainLines:
    """A line on stderr every ten seconds, at every validation and at the end."""

    def __init__(self, steps: int, done: int) -> None:
        self.clock, self.shown = Clock(steps, done), -EVERY

    def update(self, record: dict[str, Any]) -> None:
        now, last = time.monotonic(), record["step"] == self.clock.steps
        if last or "validation" in record or now - self.shown >= EVERY:
            self.shown = now
            print(describe(record, self.clock.steps, self.clock.left(record["step"])), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class OneLine:
    """A bar and a line that are rewritten in place, for a terminal."""

    def __init__(self, steps: int, done: int) -> None:
        self.clock = Clock(steps, done)
        self.validation: dict[str, float] = {}

    def update(self, record: dict[str, Any]) -> None:
        self.validation = record.get("validation", self.validation)
        step, steps = record["step"], self.clock.steps
        bar = "#" * (WIDTH * step // steps)
        line = f"[{bar:{WIDTH}}] {describe(record | {'validation': self.validation}, steps, self.clock.left(step))}"
        print(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print(file=sys.stderr, flush=True)


class TensorBoard:
    """The numbers of each record as scalars below `<run>/tensorboard`."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "train.tensorboard needs the package tensorboard: pip install 'nestling[track]'"
            ) from error
        self.writer: Any = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def update(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


def scalars(record: dict[str, Any], path: str = "") -> dict[str, float]:
    """The numbers of a nested record by path."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{path}{name}/")
        elif isinstance(value, list):
            found |= {f"{path}{name}/{i}": part for i, part in enumerate(value)}
        else:
            found[path + name] = value
    return found


class Followers:
    """All followers of a run; closed together."""

    def __init__(self, folder: Path, *, steps: int, done: int, tensorboard: bool) -> None:
        self.all: list[Follower] = [terminal(steps, done)]
        if tensorboard:
            self.all.append(TensorBoard(folder, done))

    def update(self, record: dict[str, Any]) -> None:
        for follower in self.all:
            follower.update(record)

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for follower in self.all:
            follower.close()


def terminal(steps: int, done: int) -> Follower:
    """A rewritten line where stderr is a terminal, else plain lines."""
    return OneLine(steps, done) if sys.stderr.isatty() else PlainLines(steps, done)
