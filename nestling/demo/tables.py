"""The tables of the demo, for the terminal and for the report."""

from __future__ import annotations

import html
from dataclasses import dataclass

from nestling.demo.results import Results


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under column heads; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """For a terminal."""
        lines = [("", *self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        drawn = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        return "\n".join([self.title, drawn[0], "-" * len(drawn[0]), *drawn[1:]])

    def html(self) -> str:
        """For the report."""

        def row(cells: tuple[str, ...], tag: str) -> str:
            first, *rest = (html.escape(cell) for cell in cells)
            return f"<tr><th>{first}</th>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in rest) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        head = row(("", *self.columns), "th")
        return f"<table><caption>{html.escape(self.title)}</caption>\n{head}\n{body}</table>"


def training_table(r: Results) -> Table:
    """Size, training, and held-out losses of the two models."""
    hope, other = r.training["hope"], r.training["transformer"]
    here, full, window = (r.held_out[name] for name in ("hope", "transformer", "transformer-window"))
    long = 4 * r.length
    return Table(
        title=f"Trained on {r.trained_on}, {r.length} tokens per row; held-out loss in nats per token",
        columns=("Hope", "Transformer++"),
        rows=(
            ("parameters", f"{hope.parameters:,}", f"{other.parameters:,}"),
            ("tokens trained on", f"{hope.tokens:,}", f"{other.tokens:,}"),
            ("seconds of training", f"{hope.seconds:.0f}", f"{other.seconds:.0f}"),
            (f"loss at {r.length} tokens", f"{here.short:.4f}", f"{full.short:.4f}"),
            (f"loss at {long:,} tokens, window {r.length}", "", f"{window.long:.4f}"),
            (f"loss at {long:,} tokens, all in view", f"{here.long:.4f}", f"{full.long:.4f}"),
        ),
    )


def reading_table(r: Results) -> Table:
    """The three readings."""
    reads = [r.reading[name] for name in ("hope-learning", "hope-frozen", "transformer")]
    unchanged = f"{r.forgetting.before:.4f}"
    return Table(
        title=f"Reading {r.read_tokens:,} tokens of {r.read}, never seen before; bits per byte",
        columns=("Hope, learning", "Hope, CMS frozen", f"Transformer++, window {r.length}"),
        rows=(
            ("first half", *(f"{read.first_half:.4f}" for read in reads)),
            ("second half", *(f"{read.second_half:.4f}" for read in reads)),
            ("whole text", *(f"{read.whole:.4f}" for read in reads)),
            ("writes of the levels", *(written(read.writes[-1].counts) for read in reads)),
            ("seconds of reading", *(f"{read.seconds:.1f}" for read in reads)),
            (f"then on {r.trained_on}, nats", f"{r.forgetting.after:.4f}", unchanged, ""),
        ),
    )


def written(counts: tuple[float, ...]) -> str:
    """Writes of each level, fast to slow."""
    return " + ".join(f"{count:.0f}" for count in counts) if any(counts) else "none"


def tables(r: Results) -> tuple[Table, Table]:
    """Both tables."""
    return training_table(r), reading_table(r)
