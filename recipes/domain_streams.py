"""Four kinds of text one after the other, read once: the loss on all of them after each, by method.

    python -m recipes.domain_streams --data DIR          # DIR/lm; needs the extra `test` (transformers, peft)
    python -m recipes.domain_streams --table             # the committed result as a table
    python -m recipes.domain_streams --figure            # and as docs/figures/domain_streams.png

The bundled pretrained model (260,032 parameters, TinyStories) reads Shakespeare, Wikipedia, a novel and, last, what it
was made of: children's stories. Each is a number of windows drawn by the seed from the first nine tenths of its text,
read once, in batches of four; the last tenth is held out, its first half for choosing, its second for the table.

One number of each method is the best of four by the mean loss over all domains at the end, with one seed on the halves
for choosing. EWC has the rate of sequential fine-tuning, and begins with the Fisher of text that the model sampled
itself; the CMS levels of Hope-1, -2, -3 (periods of 4; 4 and 16; 4, 16 and 64 windows) spare the inputs of that text,
and online those of what was read. Hope-2 and -3 have the rate of Hope-1. "one period (2)", "(3)": the levels of Hope-2
(Hope-3), all with a period of 4 windows, at its rates per window.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.data import load_documents
from nestling.evals.continual import continual, mean
from nestling.evals.statistics import interval, paired
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, parser_of, run, shown
from recipes.continual_methods import COLOURS

if TYPE_CHECKING:
    from recipes.continual_methods.language import Text

DOMAINS = {
    "Shakespeare": "shakespeare",  # bundled
    "Wikipedia": "lm/wikitext2_valid.txt.xz",
    "novel": "moby_dick",  # bundled
    "stories": "lm/tinystories_sample.txt.xz",
}
LENGTH, WINDOWS, ASKED, BATCH, BUFFER, FISHER = 128, 64, 24, 4, 32, 16
CHOOSING_SEED = 100
RUNS = Path("runs/domain_streams")
WRITE, ADAM = (0.06, 0.2, 0.6, 1.8), (3e-5, 1e-4, 3e-4, 1e-3)
METHODS: dict[str, tuple[float, ...]] = {
    "Hope-1": WRITE,
    "Hope-2": WRITE,
    "Hope-3": WRITE,
    "one period (2)": WRITE,
    "one period (3)": WRITE,
    "sequential": ADAM,
    "LoRA": (1e-4, 3e-4, 1e-3, 3e-3),
    "EWC": (1e2, 1e3, 1e4, 1e5),
    "replay": ADAM,
    "joint": (1e-4, 3e-4, 1e-3, 3e-3),
}


def windows(folder: str | None, seed: int, part: int) -> tuple[list[list[Text]], list[list[Text]]]:
    """Texts to learn and texts to be asked about, by domain; part 0 of what is held out is for choosing, 1 for the
    table."""
    from recipes.continual_methods.language import tokenizer

    learned, asked = [], []
    for number, name in enumerate(DOMAINS.values()):
        text = "".join(load_documents(name, folder))
        end, half = len(text) * 9 // 10, len(text) // 20
        generator = random.Random(4 * seed + number)
        starts = [generator.randrange(end - 8 * LENGTH) for _ in range(WINDOWS)]
        learned.append([(window(text[s:], tokenizer().encode), 1) for s in starts])
        step = (half - 8 * LENGTH) // ASKED
        held = [end + part * half + i * step for i in range(ASKED)]
        asked.append([(window(text[s:], tokenizer().encode), 1) for s in held])
    return learned, asked


def window(text: str, encode) -> Tensor:  # type: ignore[no-untyped-def]
    """(LENGTH,) the first ids of a text."""
    return torch.from_numpy(encode(text[: 8 * LENGTH]))[:LENGTH]


def run_cell(name: str, value: float, rate: float, seed: int, folder: str | None, *, tuning: bool) -> Cell:
    """One method and seed: the loss on every domain before the first and after each (joint: after all)."""

    def work() -> Cell:
        from recipes.continual_methods.language import make

        learned, asked = windows(folder, seed, 0 if tuning else 1)
        task, method = make(name, value, rate, batch=BATCH, buffer=BUFFER, fisher=FISHER, seed=seed)

        def losses() -> list[float]:
            with method.reading():
                sums = [task.nats(part) for part in asked]
            return [nats / count for nats, count in sums]

        first = losses()
        if name == "joint":
            every = [example for part in learned for example in part]
            random.Random(seed).shuffle(every)
            learned = [every]
        after = []
        for t, part in enumerate(learned):
            method.learn(part)
            if not tuning or t == len(learned) - 1:
                after.append(losses())
        return {"first": first, "losses": after}

    return cell(RUNS, f"{'choose' if tuning else 'test'}-{name}-{value:g}-{seed}", work)


def report(seeds: int, folder: str | None) -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"domains": list(DOMAINS), "tried": {}, "chosen": {}, "methods": {}}
    rate = 0.0
    for name in ("sequential", *(name for name in METHODS if name != "sequential")):
        same = "Hope-1" if name.startswith(("Hope", "one period")) else name
        found = {
            f"{value:g}": mean(run_cell(same, value, rate, CHOOSING_SEED, folder, tuning=True)["losses"][-1])
            for value in METHODS[name]
        }
        value = min(METHODS[name], key=lambda v: found[f"{v:g}"])
        rate = value if name == "sequential" else rate
        metrics["tried"][name], metrics["chosen"][name] = found, value
    for name in METHODS:
        cells = [run_cell(name, metrics["chosen"][name], rate, seed, folder, tuning=False) for seed in range(seeds)]
        made: Cell = {"cells": cells, "final": [mean(c["losses"][-1]) for c in cells]}
        if name != "joint":
            numbers = [continual(c["losses"], smaller_is_better=True, initial=c["first"]).to_dict() for c in cells]
            made |= {key: [n[key] for n in numbers] for key in numbers[0] if key != "average"}
        metrics["methods"][name] = made
    ends = {name: made["final"] for name, made in metrics["methods"].items()}
    metrics["differences"] = {
        hope: {other: vars(paired(ends[hope], ends[other])) for other in ends if other != hope}
        for hope in ends
        if hope.startswith("Hope")
    }
    config = {"length": LENGTH, "windows": WINDOWS, "asked": ASKED, "batch": BATCH, "buffer": BUFFER, "fisher": FISHER}
    return write_result("domain_streams", config, list(range(seeds)), rounded(metrics))


def page(result: Cell) -> str:
    """The result as markdown, nats per token."""
    metrics = result["metrics"]
    domains = metrics["domains"]
    first = next(iter(metrics["methods"].values()))["cells"][0]["first"]
    best = min(metrics["differences"], key=lambda name: mean(metrics["methods"][name]["final"]))
    lines = [f"| method | {' | '.join(domains)} | mean | forgetting | {best} less this |"]
    lines += ["|---" + "|---:" * (len(domains) + 3) + "|"]
    lines += [f"| before | {' | '.join(f'{x:.3f}' for x in first)} | {mean(first):.3f} | | |"]
    for name, made in metrics["methods"].items():
        ends = [mean(values) for values in zip(*(c["losses"][-1] for c in made["cells"]), strict=True)]
        lost = shown(vars(interval(made["forgetting"])), ".3f") if "forgetting" in made else ""
        gap = "" if name == best else shown(metrics["differences"][best][name], "+.3f")
        average = shown(vars(interval(made["final"])), ".3f")
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in ends)} | {average} | {lost} | {gap} |")
    return "\n".join([*lines, "", f"CPU time: {cpu_minutes(metrics):.0f} minutes (rates not counted)."])


def draw(result: Cell, path: Path) -> None:
    """The loss on each domain, before and after each, by method; means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = result["metrics"]
    domains = metrics["domains"]
    figure, axes = plt.subplots(1, len(domains), figsize=(13, 3.8))
    for j, (panel, domain) in enumerate(zip(axes, domains, strict=True)):
        for name in metrics["methods"]:
            colour = COLOURS[name]
            cells = metrics["methods"][name]["cells"]
            curves = [[c["first"][j], *(row[j] for row in c["losses"])] for c in cells]
            curve = [mean(points) for points in zip(*curves, strict=True)]
            if name == "joint":
                panel.axhline(curve[-1], color=colour, linestyle=":", label=name)
            else:
                panel.plot(["before", *domains], curve, color=colour, marker=".", linewidth=1.2, label=name)
        panel.set_title(f"on {domain}", fontsize=10)
        panel.tick_params(axis="x", rotation=40, labelsize=8)
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.supylabel("nats per token", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("domain_streams", __doc__)
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("domain_streams", options, lambda: report(options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
