"""Time and memory of a piece of work, side by side with others in one process.

Time on a CPU is process CPU time (all threads together), which other processes on the machine disturb least; wall
time stands beside it. Time on a GPU is that between two events on the device. Memory on a CPU is read off the
allocator's own record in torch's profiler, every temporary included; on a GPU off the allocator's counter. For long
work, whose record would itself be gigabytes, it is the memory of a process of its own.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of one work: `seconds` is CPU time or device time, `wall` the clock on the wall."""

    seconds: tuple[float, ...]
    wall: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Median, fastest and slowest repeat, their number, median on the wall."""
        return {
            "seconds": self.median,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "repeats": len(self.seconds),
            "wall": median(self.wall),
        }


def side_by_side(works: Mapping[str, Work], *, repeats: int = 5, device: str = "cpu") -> dict[str, Timing]:
    """Every work once to warm up, then `repeats` rounds of all of them in turn, so that drift meets all alike."""
    for work in works.values():
        work()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(timed(work, device))
    return {name: Timing(*zip(*pairs, strict=True)) for name, pairs in found.items()}


def timed(work: Work, device: str = "cpu") -> tuple[float, float]:
    """(CPU or device seconds, wall seconds) of one call."""
    if device.startswith("cuda"):
        return _timed_on_cuda(work)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _timed_on_cuda(work: Work) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, time.perf_counter() - wall


def peak_bytes(work: Work, device: str = "cpu") -> int:
    """The most memory that the work holds at once beyond what was there before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notices would land between the lines of our table
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as record:
        work()
    assert record.kineto_results is not None
    live = peak = 0
    changes = [(e.start_ns(), e.nbytes()) for e in record.kineto_results.events() if e.name() == "[memory]"]
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak


def resident() -> int:
    """The most memory that this process has held, in bytes, since it began or since `forget_peak`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux at least what the parent held
    return size if sys.platform == "darwin" else 1024 * size


def forget_peak() -> None:
    """Let the peak of `resident` begin at what is held now, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads inside torch's operators, and what it was before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ceilings(*, size: int = 1024, numbers: int = 2**25, repeats: int = 5) -> dict[str, float]:
    """What one thread can reach here: FLOP/s of a large float32 product and of batched ones of width 64 (the size of a
    head's matrices), and bytes/s of adding two arrays that no cache holds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    small, other = torch.randn(256, 64, 64), torch.randn(256, 64, 64)
    x, y, z = torch.randn(numbers), torch.randn(numbers), torch.empty(numbers)
    found = side_by_side(
        {
            "product": lambda: torch.mm(a, b),
            "batch": lambda: torch.bmm(small, other),
            "add": lambda: torch.add(x, y, out=z),
        },
        repeats=repeats,
    )
    fastest = {name: min(t.seconds) for name, t in found.items()}
    return {
        "flops": 2 * size**3 / fastest["product"],
        "flops of width 64": 2 * 256 * 64**3 / fastest["batch"],
        "bandwidth": 12 * numbers / fastest["add"],
    }
