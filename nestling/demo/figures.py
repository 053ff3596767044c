"""The plots of the report, each as one SVG element."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nestling.demo.results import Points, Read, Results
from nestling.introspect import Boxes

COLOURS = {"hope": "#c2410c", "frozen": "#e2a36f", "transformer": "#1d4ed8", "window": "#7ba4ee"}


def require_matplotlib() -> None:
    """Raise ImportError naming the extra if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "the demo draws with matplotlib, which is not installed; pip install 'nestling[plot]'"
        ) from None


def axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure with one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def line(axis: Any, points: Points, label: str, colour: str, style: str = "-") -> None:
    """A curve through points."""
    axis.plot([x for x, _ in points], [y for _, y in points], style, color=colour, label=label, linewidth=1.6)


def training(r: Results) -> Any:
    """Held-out loss while the two models train."""
    title = f"Training: loss on held-out {r.trained_on}, windows of {r.length}"
    figure, axis = axes(title, "tokens trained on", "nats per token")
    line(axis, r.training["hope"].validation, "Hope", COLOURS["hope"], ".-")
    line(axis, r.training["transformer"].validation, "Transformer++", COLOURS["transformer"], ".-")
    return finished(figure, axis)


def positions(r: Results) -> Any:
    """Held-out loss by position up to 4 times the training length."""
    title = f"Beyond the training length: held-out {r.trained_on}, all models frozen"
    figure, axis = axes(title, "position in the window", "nats per token")
    line(axis, r.held_out["hope"].by_position, "Hope", COLOURS["hope"])
    line(axis, r.held_out["transformer"].by_position, "Transformer++, full attention", COLOURS["transformer"])
    label = f"Transformer++, window {r.length}"
    line(axis, r.held_out["transformer-window"].by_position, label, COLOURS["window"], "--")
    axis.axvline(r.length, color="#666", linewidth=0.8, linestyle=":")
    axis.annotate("training length", (r.length, 0.02), (3, 0), ("data", "axes fraction"), "offset points", fontsize=8)
    return finished(figure, axis)


def reading(r: Results) -> Any:
    """Bits per byte along the unseen text."""
    title = f"Reading {r.read}: loss by position in the text"
    figure, axis = axes(title, "tokens read", "bits per byte")
    line(axis, r.reading["transformer"].by_position, f"Transformer++, window {r.length}", COLOURS["transformer"])
    line(axis, r.reading["hope-frozen"].by_position, "Hope, CMS frozen", COLOURS["frozen"])
    line(axis, r.reading["hope-learning"].by_position, "Hope, learning", COLOURS["hope"])
    return finished(figure, axis)


def writes(read: Read, names: dict[str, str]) -> Any:
    """Length of each level's writes over the text; `names` = label of each level's path."""
    figure, axis = axes("Writes of the CMS levels while reading", "tokens read", "length of the last write / |W|")
    marks = ("o", "s", "^", "v", "D", "P")
    for number, (path, label) in enumerate(names.items()):
        seen = [(w.tokens, w.norms[path]) for w in read.writes if w.norms[path] > 0]
        axis.plot(
            [x for x, _ in seen], [y for _, y in seen], marker=marks[number % len(marks)], markersize=3,
            linewidth=1, alpha=0.85, label=f"{label}",
        )  # fmt: skip
    axis.set_ylim(bottom=0)
    return finished(figure, axis)


def finished(figure: Any, axis: Any) -> Any:
    """The figure with its legend."""
    axis.legend(fontsize=8, frameon=False)
    return figure


def svg_of(figure: Any) -> str:
    """A figure as an SVG element."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return element(written.getvalue())


def svg_of_levels(boxes: Boxes) -> str:
    """The levels figure as an SVG element."""
    with tempfile.TemporaryDirectory() as folder:
        return element(boxes.figure(Path(folder) / "levels.svg").read_text(encoding="utf-8"))


def element(document: str) -> str:
    """An SVG document without its XML head, as HTML wants it."""
    return document[document.index("<svg") :]


def all_figures(r: Results, names: dict[str, str], boxes: Boxes) -> Iterable[tuple[str, str]]:
    """(heading, SVG) in the order of the report."""
    yield "It learns", svg_of(training(r))
    yield "Beyond the training length", svg_of(positions(r))
    yield "It keeps learning", svg_of(reading(r))
    yield "What it writes", svg_of(writes(r.reading["hope-learning"], names))
    yield "Its levels", svg_of_levels(boxes)
