"""Box: a level together with the tensors that a write of it changes; Boxes: a model's boxes, fast to slow."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

from nestling.core.level import Clock, Level, Levels


@dataclass(frozen=True, kw_only=True)
class Box(Level):
    """A level and the size of what one write changes. On the step clock a half-life is in steps."""

    tensors: int = 0  # tensors that a write changes; 0 = not stated (memories whose state is a value)
    elements: int = 0  # numbers in these tensors

    @classmethod
    def of(cls, level: Level, *, prefix: str = "") -> Box:
        """The box of a declared level, its name put under `prefix`."""
        if isinstance(level, Box) and not prefix:
            return level
        same = {f.name: getattr(level, f.name) for f in fields(level)}
        return cls(**same | {"name": f"{prefix}.{level.name}" if prefix else level.name})


class Boxes(Sequence[Box]):
    """Boxes ordered fast to slow; prints as a table, dumps as JSON, draws as a figure."""

    def __init__(self, boxes: Iterable[Level]) -> None:
        self._levels = Levels(Box.of(box) for box in boxes)
        self._boxes = tuple(box for box in self._levels if isinstance(box, Box))

    @overload
    def __getitem__(self, index: int) -> Box: ...
    @overload
    def __getitem__(self, index: slice) -> Boxes: ...
    def __getitem__(self, index: int | slice) -> Box | Boxes:
        return Boxes(self._boxes[index]) if isinstance(index, slice) else self._boxes[index]

    def __len__(self) -> int:
        return len(self._boxes)

    def __iter__(self) -> Iterator[Box]:
        return iter(self._boxes)

    def __repr__(self) -> str:
        return f"Boxes({list(self._boxes)})"

    def __str__(self) -> str:
        return self.table()

    @property
    def parameters(self) -> int:
        """Slow parameters of all boxes together; each is owned by one box."""
        return sum(box.parameters for box in self)

    def on(self, clock: Clock) -> Boxes:
        """Only the boxes of one clock."""
        return Boxes(box for box in self if box.clock == clock)

    def by_frequency(self) -> list[Boxes]:
        """The levels in the paper's sense: boxes of equal clock and period, fast to slow."""
        return [Boxes(level) for level in self._levels.by_frequency()]

    def table(self, width: int | None = None) -> str:
        """The boxes as text, `width` columns wide (default: the terminal); like boxes of many blocks share a row."""
        from nestling.introspect.table import render

        return render(self, width)

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary per box that JSON can hold: an infinite period is the string "inf"."""
        return [{k: "inf" if v == math.inf else v for k, v in asdict(box).items()} for box in self]

    def to_json(self) -> str:
        """The boxes as a JSON list."""
        return json.dumps(self.as_dicts(), indent=2)

    def figure(self, path: str | Path) -> Path:
        """Draw the boxes on a logarithmic axis of periods into `path` (its ending gives the format: svg, png, pdf)."""
        from nestling.introspect.figure import draw

        return draw(self, Path(path))
