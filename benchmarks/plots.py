"""The figure of docs/performance.md, drawn from the result files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FIGURE = Path("docs/figures/performance.png")
COLOURS = {"transformer block": "#7a7a7a", "self-modifying": "#c05621", "hope": "#2b6cb0"}
Records = Mapping[str, dict[str, Any]]


def by_length(axes: Any, records: Records) -> None:
    """Tokens per second against the length of the sequence."""
    for name, colour in COLOURS.items():
        rows = [r for r in records["length"]["metrics"]["rows"] if r["name"] == name]
        axes.plot([r["length"] for r in rows], [r["tokens_per_second"] for r in rows], "o-", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the sequence", ylabel="tokens/s, forward + backward")
    lengths = sorted({r["length"] for r in records["length"]["metrics"]["rows"]})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_title("against context length")
    axes.legend(fontsize=8)


def by_chunk(axes: Any, records: Records) -> None:
    """Tokens per second of the layer against its chunk size."""
    for name in ("transformer block", "self-modifying"):
        for training, line in ((False, "--"), (True, "-")):
            rows = [r for r in records["chunks"]["metrics"]["rows"] if r["name"] == name and r["training"] is training]
            label = f"{name}, {'forward + backward' if training else 'forward'}"
            axes.plot(
                [r["chunk_size"] for r in rows],
                [r["tokens_per_second"] for r in rows],
                f"o{line}",
                color=COLOURS[name],
                label=label,
            )
    sizes = sorted({r["chunk_size"] for r in records["chunks"]["metrics"]["rows"]})
    axes.set(xlabel="tokens per chunk", ylabel="tokens/s", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_title("against chunk size, 2 × 2,048 × 256")
    axes.legend(fontsize=7)


def roofline(axes: Any, records: Records) -> None:
    """FLOP/s reached against FLOPs per byte, under what one thread can reach."""
    machine = records["machine"]["metrics"]["1 thread"]
    peak, slope = machine["flops"] / 1e9, machine["bandwidth"] / 1e9
    reach = [0.3, peak / slope, 300]
    axes.plot(reach, [min(peak, slope * x) for x in reach], color="black", linewidth=1)
    axes.axhline(machine["flops of width 64"] / 1e9, color="black", linewidth=0.6, linestyle=":")
    points = [r for r in records["ops"]["metrics"]["rows"] if r.get("form") == "chunk" and r["training"]]
    points += [r for r in records["layers"]["metrics"]["1 thread"] if r.get("training")]
    for r in points:
        x = r["flops_per_token"] / r["bytes_per_token"]
        colour = COLOURS["self-modifying"] if "form" in r else COLOURS["hope"]
        axes.plot(x, r["gflops_per_second"], "o", color=colour, markersize=4)
        axes.annotate(r["name"], (x, r["gflops_per_second"]), fontsize=6, textcoords="offset points", xytext=(4, -3))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s, forward + backward")
    axes.set_title("roofline, one thread (dotted: batches of 64 × 64)")


def stream(axes: Any, records: Records) -> None:
    """Time per token and memory over a million tokens."""
    rows = records["stream"]["metrics"]["stream"]
    tokens = [r["tokens"] for r in rows]
    axes.plot(tokens, [1e6 * r["seconds_per_token"] for r in rows], color=COLOURS["hope"])
    axes.set(xlabel="tokens read, writes on", ylabel="µs per token", ylim=(0, None))
    memory = axes.twinx()
    memory.plot(tokens, [r["state_bytes"] / 1e6 for r in rows], "--", color=COLOURS["self-modifying"])
    memory.plot(tokens, [r["resident"] / 1e6 for r in rows], ":", color=COLOURS["self-modifying"])
    memory.set(ylabel="MB: state (dashed), process (dotted)", yscale="log", ylim=(1, 2000))
    axes.set_title("a stream through the tiny Hope")


PANELS: list[tuple[Callable[[Any, Records], None], tuple[str, ...]]] = [
    (by_length, ("length",)),
    (by_chunk, ("chunks",)),
    (roofline, ("machine", "ops", "layers")),
    (stream, ("stream",)),
]


def draw(records: Records, path: Path = FIGURE) -> None:
    """Four panels; one whose results are missing says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    for (panel, needs), where in zip(PANELS, axes.flat, strict=True):
        if all(part in records for part in needs):
            panel(where, records)
        else:
            where.text(0.5, 0.5, "not measured", ha="center")
            where.set_axis_off()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
