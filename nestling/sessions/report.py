"""What a session knows about itself: what was read and said, what was written where, how far, and in how many bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core.state import nbytes
from ..memories.continuum import ContinuumLevel, LevelState, continuum_levels
from ..models import ReadingModel, State


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened in a session.

    Attributes:
        what: "read", "generate", "chat", "reset ...". learn: whether the levels could write.
        tokens: read and said. nats: mean surprise per predicted token of what was read; None = nothing was predicted.
    """

    what: str
    tokens: int
    learn: bool
    nats: float | None = None


@dataclass(frozen=True, kw_only=True)
class LevelReport:
    """One level of a session.

    Attributes:
        level: its path in the model. period: tokens between two writes. writes: how many so far.
        waiting: tokens since the last one. last: length of the last write, relative to the weights.
        moved: length of all writes together, |D| / |W|. bytes: of its state.
    """

    level: str
    period: float
    writes: int
    waiting: int
    last: float
    moved: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """A session at one moment. `bound` is what its state may grow to, None = without bound (attention over all)."""

    session: str
    tokens: int
    bytes: int
    bound: int | None
    levels: tuple[LevelReport, ...]
    events: tuple[Event, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        limit = "no bound" if self.bound is None else f"at most {self.bound:,}"
        lines = [f"session {self.session}: {self.tokens:,} tokens, {self.bytes:,} bytes ({limit})"]
        width = max([len(row.level) for row in self.levels], default=5)
        lines.append(f"  {'level':{width}}  period  writes  waiting  last write  moved    bytes")
        for r in self.levels:
            counts = f"{r.period:>6g}  {r.writes:>6}  {r.waiting:>7}"
            lines.append(f"  {r.level:{width}}  {counts}  {r.last:>10.5f}  {r.moved:.5f}  {r.bytes:,}")
        lines += [f"  {_event(event)}" for event in self.events]
        return "\n".join(lines)


def _event(event: Event) -> str:
    surprise = "" if event.nats is None else f", {event.nats:.3f} nats per token"
    return f"{event.what}: {event.tokens:,} tokens{surprise}{'' if event.learn else ', nothing learned'}"


def report_of(name: str, model: ReadingModel, state: State | None, events: tuple[Event, ...]) -> Report:
    """The report of one sequence."""
    levels = continuum_levels(model)
    waiting = 0 if state is None or state.tree.segment is None else int(state.tree.segment.length[0])
    rows = [] if state is None else [_level(path, levels[path], s, waiting) for path, s in state.tree.fast.items()]
    sizes = [box.state_bytes for box in model.levels()]
    bound = None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)
    return Report(
        session=name,
        tokens=0 if state is None else int(state.tokens[0]),
        bytes=0 if state is None else state.nbytes,
        bound=bound,
        levels=tuple(rows),
        events=events,
    )


def _level(path: str, level: ContinuumLevel, state: LevelState, waiting: int) -> LevelReport:
    moved = [delta.norm()[0].double() for delta in state.delta.values() if not delta.empty]
    weights = [torch.linalg.vector_norm(m.weight.detach()).double() for m in level.maps.values()]
    length = torch.stack(moved).norm() if moved else torch.zeros(())
    return LevelReport(
        level=path.removeprefix("pretrained."),
        period=level.period,
        writes=int(state.writes[0]),
        waiting=int(state.clock[0]) + waiting,
        last=float(state.norm[0]),
        moved=float(length / torch.stack(weights).norm()),
        bytes=nbytes(state),
    )
