"""The result of recipes/babilong.py as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.evals import interval
from recipes.cells import Cell, cpu_minutes

DISTANCES = (16_384, 65_536, 262_144, 524_288, 2**20)  # tokens between a fact and its question, up to


def page(result: Cell) -> str:
    """The result as markdown: accuracy by length, rates, the stream."""
    metrics = result["metrics"]
    lengths = list(next(iter(metrics["tests"].values())))
    lines = [f"| model | rate | {' | '.join(map(tokens, lengths))} |", "|---" * (2 + len(lengths)) + "|"]
    for name, tests in metrics["tests"].items():
        shown = [accuracy(tests[length]) if length in tests else "" for length in lengths]
        lines.append(f"| {name} | {metrics['chosen rate'][name]:g} | {' | '.join(shown)} |")
    counts = [sum(c["n"] for c in next(iter(metrics["tests"].values()))[length]) for length in lengths]
    lines += [f"| questions | | {' | '.join(map(str, counts))} |", "", f"Chance {100 * metrics['chance']:.0f} %."]
    lines += ["", *differences(metrics["against hope"], lengths)]
    for name, seeds in metrics["streams"].items():
        lines += ["", *stream(name, seeds)]
    return "\n".join([*lines, "", f"CPU time: {cpu_minutes(metrics):.0f} minutes."])


def tokens(length: str | int) -> str:
    """4096 as 4K."""
    size = int(length)
    return f"{size // 2**20}M" if size >= 2**20 else f"{size // 1024}K" if size >= 1024 else str(size)


def accuracy(cells: Sequence[Cell]) -> str:
    """Mean of the seeds with its interval, in %."""
    found = interval([100 * c["accuracy"] for c in cells])
    low = "" if found.low is None or found.high is None else f" [{max(0, found.low):.0f}, {min(100, found.high):.0f}]"
    return f"{found.mean:.0f}{low}"


def differences(against: Cell, lengths: Sequence[str]) -> list[str]:
    """Hope less another model, in points, with the verdict on Hope where there is one."""
    lines = [f"| hope less | {' | '.join(map(tokens, lengths))} |", "|---" * (1 + len(lengths)) + "|"]
    for name, by_length in against.items():
        shown = [difference(by_length[length]) if length in by_length else "" for length in lengths]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines if len(lines) > 2 else []


def difference(found: Cell) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    said = "" if found["hope is"] == "no difference shown" else f" **{found['hope is']}**"
    return f"{mean:+.0f} [{low:.0f}, {high:.0f}]{said}"


def by_distance(seeds: Sequence[Cell]) -> list[tuple[int, int, int]]:
    """Up to this many tokens since the fact: right answers, questions."""
    asked = [(distance, right) for cell in seeds for _, distance, right in cell["asked"]]
    made = []
    for low, high in zip((0, *DISTANCES), DISTANCES, strict=False):
        answers = [right for distance, right in asked if low < distance <= high]
        made.append((high, sum(answers), len(answers)))
    return made


def at_the_end(seeds: Sequence[Cell]) -> tuple[int, int]:
    """Right answers and questions when all was read."""
    last = max(now for cell in seeds for now, _, _ in cell["asked"])
    answers = [right for cell in seeds for now, _, right in cell["asked"] if now == last]
    return sum(answers), len(answers)


def peaks(cell: Cell) -> list[float]:
    """Peak memory of the process after a quarter, a half, and the whole of the stream, in MiB."""
    memory = cell["memory"]
    return [memory[len(memory) * part // 4 - 1]["peak_bytes"] / 2**20 for part in (1, 2, 4)]


def stream(name: str, seeds: Sequence[Cell]) -> list[str]:
    """Answers by distance, and memory."""
    rows = by_distance(seeds)
    right, asked = at_the_end(seeds)
    memory = [[f"{mib:.0f}" for mib in peaks(cell)] for cell in seeds]
    ratio = max(peaks(cell)[2] / peaks(cell)[0] for cell in seeds)
    titles = [f"{tokens(low)}-{tokens(high)}" for low, high in zip((0, *DISTANCES), DISTANCES, strict=False)]
    return [
        f"| {name}, tokens since the fact | {' | '.join(titles)} | all, at the end |",
        "|---" * (2 + len(titles)) + "|",
        f"| right, % (questions) | {' | '.join(share(r, n) for _, r, n in rows)} | {share(right, asked)} |",
        "",
        f"Process memory at 1/4, 1/2, 1/1, MiB: {'; '.join(' / '.join(m) for m in memory)}; "
        f"whole against a quarter at most {ratio:.3f}.",
    ]


def share(right: int, asked: int) -> str:
    return f"{100 * right / asked:.0f} ({asked})" if asked else ""


def draw(result: Cell, path: Path) -> None:
    """Accuracy by length, accuracy by distance in the stream, memory by tokens read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = result["metrics"]
    figure, (lengths, distance, memory) = plt.subplots(1, 3, figsize=(13, 4))
    places = {length: i for i, length in enumerate(next(iter(metrics["tests"].values())))}
    for i, (name, tests) in enumerate(metrics["tests"].items()):
        means = [interval([100 * c["accuracy"] for c in cells]) for cells in tests.values()]
        at = [places[length] + 0.04 * (i - 2) for length in tests]
        spread = [[m.mean - max(0, m.low or 0) for m in means], [min(100, m.high or 0) - m.mean for m in means]]
        bars: Any = spread if means[0].n > 1 else None
        lengths.errorbar(at, [m.mean for m in means], yerr=bars, marker="o", ms=4, lw=1.3, capsize=2, label=name)
    lengths.set_xticks(list(places.values()), [tokens(length) for length in places])
    lengths.set(xlabel="tokens of the text (trained to 4K)", ylabel="right answers, %", title="qa1 in a book")
    for name, seeds in metrics["streams"].items():
        rows = [(high, 100 * right / n) for high, right, n in by_distance(seeds) if n]
        color = f"C{list(metrics['tests']).index(name)}"
        distance.plot([h for h, _ in rows], [r for _, r in rows], marker="o", color=color, label=name)
        for cell in seeds:
            read = [m["tokens"] / 2**20 for m in cell["memory"]]
            memory.plot(read, [m["peak_bytes"] / 2**20 for m in cell["memory"]], color=color, lw=1)
    distance.set_xscale("log", base=2)
    distance.set_xticks(DISTANCES, [tokens(d) for d in DISTANCES])
    distance.set(xlabel="tokens between fact and question, up to", title="along a stream of 1M tokens")
    for panel in (lengths, distance):
        panel.axhline(100 * metrics["chance"], color="gray", ls=":", lw=1, label="chance")
        panel.set_ylim(-3, 103)
    memory.set(xlabel="million tokens read", ylabel="peak memory of the process, MiB", title="memory", ylim=(0, None))
    distance.legend(*lengths.get_legend_handles_labels(), fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
