"""The targets, each with what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Records = Mapping[str, dict[str, Any]]
Row = Mapping[str, Any]


def _row(rows: Sequence[Row], name: str, training: bool | None = None) -> Row:
    return next(r for r in rows if r["name"] == name and (training is None or r["training"] is training))


def _layer(name: str, threads: int) -> Callable[[Records], float]:
    return lambda r: _row(r["layers"]["metrics"][f"{threads} thread{'s' * (threads > 1)}"], name, True)["ratio"]


def _memory(records: Records) -> float:
    rows = records["layers"]["metrics"]["1 thread"]
    return _row(rows, "self-modifying", True)["peak_bytes"] / _row(rows, "transformer block", True)["peak_bytes"]


def _model(name: str) -> Callable[[Records], float]:
    return lambda r: _row(r["models"]["metrics"]["rows"], name)["ratio"]


def _overhead(name: str) -> Callable[[Records], float]:
    def times(records: Records) -> float:
        rows = records["models"]["metrics"]["rows"]
        return _row(rows, name)["seconds"] / _row(rows, f"{name}, static levels")["seconds"]

    return times


def _slope(name: str, what: str) -> Callable[[Records], float]:
    return lambda r: r["length"]["metrics"]["slopes"][name][what]


def _resident(outer: str) -> Callable[[Records], float]:
    return lambda r: next(x for x in r["memory"]["metrics"]["rows"] if x["outer"] == outer)["resident"] / 2**30


def _spread(learn: bool) -> Callable[[Records], float]:
    """How far apart the costs of a decoded token lie between 4K and 1M tokens of context: 1 = equal."""

    def ratio(records: Records) -> float:
        rows = [r for r in records["stream"]["metrics"]["decoding"] if r["learn"] is learn]
        costs = [r["seconds_per_token"] for r in rows]
        return max(costs) / min(costs)

    return ratio


def _flat(what: str) -> Callable[[Records], float]:
    """The last quarter of the stream over its second quarter, in time per token or bytes."""

    def ratio(records: Records) -> float:
        values = [r[what] for r in records["stream"]["metrics"]["stream"]]
        quarter = len(values) // 4
        return sum(values[-quarter:]) / sum(values[quarter : 2 * quarter])

    return ratio


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked of a number of one part: at least, at most, or both."""

    what: str
    part: str
    measured: Callable[[Records], float]
    least: float = 0.0
    most: float = math.inf
    unit: str = "×"

    def asked(self) -> str:
        if math.isinf(self.most):
            return f"≥ {self.least:g}{self.unit}"
        return f"{self.least:g} to {self.most:g}{self.unit}" if self.least else f"≤ {self.most:g}{self.unit}"

    def line(self, records: Records) -> str:
        """A line of the table: met, missed or not measured."""
        if self.part not in records:
            return f"| {self.what} | {self.asked()} | not measured | |"
        value = self.measured(records)
        verdict = "met" if self.least <= value <= self.most else "MISSED"
        return f"| {self.what} | {self.asked()} | {value:.3g}{self.unit} | {verdict} |"


def _speeds() -> list[Target]:
    block = "of a Transformer block's speed, forward + backward"
    asked = {"self-modifying": 0.6, "self-modifying x2": 0.4}
    layers = [
        Target(what=f"{name}, {n} thread{'s' * (n > 1)}: {block}", part="layers", least=least, measured=_layer(name, n))
        for name, least in asked.items()
        for n in (1, 2)
    ]
    memory = Target(what="self-modifying: of the block's peak memory", part="layers", most=4, measured=_memory)
    rivals = Target(
        what="self-modifying: of the fastest rival's that writes all five memories, forward + backward",
        part="rivals",
        least=40,
        measured=lambda r: r["rivals"]["metrics"]["times_the_fastest_of_five"]["training"],
    )
    return [*layers, memory, rivals]


def _models() -> list[Target]:
    overheads = [
        Target(
            what=f"{name}: levels that learn, cost of static ones", part="models", most=1.15, measured=_overhead(name)
        )
        for name in ("hope", "hope-attention")
    ]
    step = Target(
        what="hope: of Transformer++'s speed, training step", part="models", least=0.5, measured=_model("hope")
    )
    memory = [
        Target(
            what=f"small Hope, one step of 16K tokens, outer={outer}: the process",
            part="memory", most=4, unit=" GiB", measured=_resident(outer),
        )
        for outer in ("segment", "sequence")
    ]  # fmt: skip
    return [step, *overheads, *memory]


def _lengths() -> list[Target]:
    slopes = []
    for name in ("self-modifying", "hope"):
        what = f"{name}, 4K to 64K tokens: slope of"
        slopes += [
            Target(what=f"{what} time", part="length", least=0.9, most=1.1, unit="", measured=_slope(name, "seconds")),
            Target(what=f"{what} peak memory", part="length", most=1.02, unit="", measured=_slope(name, "peak_bytes")),
        ]
    decoding = [
        Target(
            what=f"decoding at 4K to 1M tokens, writes {'on' if on else 'off'}: dearest over cheapest",
            part="stream", most=1.1, measured=_spread(on),
        )
        for on in (False, True)
    ]  # fmt: skip
    bounds = {"seconds_per_token": (0.9, 1.1), "state_bytes": (0.0, 1.0), "resident": (0.0, 1.02)}
    names = {"seconds_per_token": "time per token", "state_bytes": "state", "resident": "memory of the process"}
    stream = [
        Target(
            what=f"a stream of 1M tokens: {names[key]}, last quarter over second",
            part="stream", least=least, most=most, measured=_flat(key),
        )
        for key, (least, most) in bounds.items()
    ]  # fmt: skip
    return [*slopes, *decoding, *stream]


TARGETS = [*_speeds(), *_models(), *_lengths()]


def table(records: Records) -> str:
    """One line per target."""
    head = ["| target | asked | measured | |", "|---|---|---|---|"]
    return "\n".join([*head, *(target.line(records) for target in TARGETS)])
