"""Knowledge incorporation: models read a passage of SQuAD, lose the context, and are asked about it.

    python -m recipes.it_learns --steps 3000 --seeds 3 --models transformer hope-attention    # trains the models first
    python -m recipes.it_learns --steps 1250 --seeds 3 --models transformer hope
    python -m recipes.knowledge --data DIR                                          # DIR/evals/squad_dev.jsonl.xz
    python -m recipes.knowledge --table                       # the committed result as a table
    python -m recipes.knowledge --figure                      # and as docs/figures/knowledge.png

One passage of 512 to 768 bytes from each of the first 24 articles, so that passages are independent, with all its
questions. The
models trained here write as in `fresh_novels` (one period, erase 1/2, the rate chosen there at the limit of 0.5 %);
the bundled pretrained model is converted with one period as in `pretrained_reading`. Nothing was chosen on SQuAD, and
every number of readings tried is in the table. Seeds of the pretrained model differ in the text that it samples for
the metric of its writes: there is one checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nestling.data import ByteTokenizer, Passage, Tokenizer, locate, one_per_article, read_passages
from nestling.data.questions import SQUAD
from nestling.evals import interval, knowledge, reconfigured
from nestling.evals.knowledge import Condition, preference, shown
from nestling.evals.protocol import Reads
from nestling.evals.statistics import Interval
from nestling.memories.continuum import InnerRule
from nestling.train import load_run
from recipes import it_learns
from recipes import pretrained_reading as pretrained
from recipes import what_limits_reading as limits
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, parser_of, run

PASSAGES, SHORTEST, LONGEST, TIMES, SEEDS = 24, 512, 768, (1, 4, 8), (0, 1, 2)
WRITES, RATE = limits.VARIANTS["one period, erase 0.5"], 0.056
STEPS = {"hope-attention": 3000, "hope": 1250}
PRETRAINED = "stories260K, converted"
MODELS = (*STEPS, PRETRAINED)
SHOWN = ("nothing", "own", "another", "context")
RUNS = Path("runs/knowledge")


def passages(folder: str | None) -> list[Passage]:
    """The passages that are read."""
    return one_per_article(read_passages(locate(SQUAD, folder)), SHORTEST, LONGEST)[:PASSAGES]


def reader(name: str, seed: int) -> tuple[Reads, Tokenizer]:
    """A model that writes at its setting, and its tokenizer."""
    if name == PRETRAINED:
        return converted(seed)
    run = it_learns.run_name(name, STEPS[name], limits.LR, seed, it_learns.DEPTH)
    model = load_run(it_learns.RUNS / run)[0]
    setting = WRITES.setting
    return reconfigured(model, **WRITES.writes, periods=setting.periods, inner_lr=setting.rates(RATE)), ByteTokenizer()


def converted(seed: int) -> tuple[Reads, Tokenizer]:
    """The pretrained model with one period."""
    from nestling.hf import convert_to_cms
    from nestling.hf.llama2c import read_model, read_tokenizer
    from nestling.hf.own_text import own_text

    periods, rates, decay = pretrained.SETTINGS["one period"]
    plain = read_model(pretrained.DATA / "stories260K.bin.xz")
    old = own_text(plain, seed=seed)
    model = convert_to_cms(plain, periods, rates=rates, rule=InnerRule(decay=decay), old_text=old)
    return model.reader, read_tokenizer(pretrained.DATA / "tok512.bin.xz")


def run_cell(name: str, seed: int, folder: str | None) -> Cell:
    """Every condition of one model."""

    def work() -> Cell:
        model, tokenizer = reader(name, seed)
        return {"conditions": [c.to_dict() for c in knowledge(model, tokenizer, passages(folder), times=TIMES)]}

    return cell(RUNS, f"{name.replace(', ', '-')}-{seed}", work)


def conditions(made: Cell) -> dict[tuple[str, int], Condition]:
    """The conditions of a cell by name and number of readings."""
    plain: list[Cell] = [{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()} for c in made["conditions"]]
    found = [Condition(**c) for c in plain]
    return {(c.name, c.times): c for c in found}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def differences(found: dict[tuple[str, int], Condition], times: int) -> dict[str, list[float]]:
    """What reading brought in bits per byte, passage by passage: at all, more than another passage, and as facts."""
    nothing, own, another = found["nothing", 0], found["own", times], found["another", times]
    return {
        "reading": less(nothing.bits, own.bits),
        "this passage": less(another.bits, own.bits),
        "facts": less(preference(own), preference(nothing)),
        "passage itself": less(another.passage or (), own.passage or ()),
    }


def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a - b, one by one."""
    return [x - y for x, y in zip(a, b, strict=True)]


def line(cells: Sequence[Cell], times: int) -> Cell:
    """One number of readings: means of each seed by condition, and the differences over seeds and over passages."""
    found = [conditions(c) for c in cells]
    made: Cell = {"times": times, "bits": {}, "swapped": {}, "right, %": {}, "passage bits": {}}
    for name in SHOWN:
        asked = [one[name, times if name in ("own", "another") else 0] for one in found]
        made["bits"][name] = [mean(c.bits) for c in asked]
        made["swapped"][name] = [mean(c.swapped) for c in asked]
        made["right, %"][name] = [100 * mean(c.exact) for c in asked]
        made["passage bits"][name] = [mean(c.passage) for c in asked if c.passage]
    gaps = [differences(one, times) for one in found]
    for what in gaps[0]:
        by_passage = [mean(values) for values in zip(*(gap[what] for gap in gaps), strict=True)]
        made[what] = {
            "over seeds": vars(interval([mean(gap[what]) for gap in gaps])),
            "over passages": vars(interval(by_passage)),
        }
    return made


def report(folder: str | None, names: Sequence[str]) -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"models": {}}
    for name in names:
        cells = [run_cell(name, seed, folder) for seed in SEEDS]
        metrics["models"][name] = {
            "lines": [line(cells, times) for times in TIMES],
            "cells": [
                {
                    "cpu_seconds": c["cpu_seconds"],
                    "bits": {f"{n}, {t}": [x.bits, x.swapped] for (n, t), x in conditions(c).items()},
                }
                for c in cells
            ],
        }
    chosen = passages(folder)
    config = {
        "passages": len(chosen),
        "questions": sum(len(p.questions) for p in chosen),
        "bytes": [SHORTEST, LONGEST],
        "times": TIMES,
        "steps": STEPS,
        "rate": RATE,
        "setting": vars(WRITES.setting),
        "writes": WRITES.writes,
        "pretrained": pretrained.SETTINGS["one period"],
    }
    return write_result("knowledge", config, list(SEEDS), rounded(json.loads(json.dumps(metrics))))


def page(result: Cell) -> str:
    """The result as markdown."""
    lines = [
        "| model | read | nothing | own | another | in context | own, swapped answers | reading brought | more than "
        "another | facts | right, % | passage itself: nothing, own, another |",
        "|---" * 12 + "|",
    ]
    for name, made in result["metrics"]["models"].items():
        for row in made["lines"]:
            bits = [f"{mean(row['bits'][c]):.2f}" for c in SHOWN] + [f"{mean(row['swapped']['own']):.2f}"]
            found = [shown(Interval(**row[what]["over seeds"])) for what in ("reading", "this passage", "facts")]
            right = ", ".join(f"{mean(row['right, %'][c]):.1f}" for c in SHOWN)
            again = ", ".join(f"{mean(row['passage bits'][c]):.2f}" for c in SHOWN[:3])
            lines.append(f"| {name} | {row['times']}x | {' | '.join([*bits, *found, right, again])} |")
    lines += ["", f"Intervals over {len(result['seeds'])} seeds. The same over the passages, means over the seeds:", ""]
    lines += ["| model | read | reading brought | more than another | facts |", "|---" * 5 + "|"]
    for name, made in result["metrics"]["models"].items():
        for row in made["lines"]:
            found = [shown(Interval(**row[what]["over passages"])) for what in ("reading", "this passage", "facts")]
            lines.append(f"| {name} | {row['times']}x | {' | '.join(found)} |")
    config = result["config"]
    lines += ["", f"{config['passages']} passages, {config['questions']} questions."]
    return "\n".join([*lines, f"{cpu_minutes(result['metrics']):.1f} CPU minutes."])


def draw(result: Cell, path: Path) -> None:
    """Bits per answer byte by number of readings, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = result["metrics"]["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.4), squeeze=False)
    for panel, (name, made) in zip(axes[0], models.items(), strict=True):
        rows = made["lines"]
        lines = {
            "after reading this passage": ("bits", "own"),
            "the same, answers swapped": ("swapped", "own"),
            "after reading another passage": ("bits", "another"),
        }
        for colour, (label, (what, condition)) in enumerate(lines.items()):
            values = [rows[0][what]["nothing"], *(row[what][condition] for row in rows)]
            places = [0, *(row["times"] for row in rows)]
            style = ":" if what == "swapped" else "-"
            panel.plot(
                places, [mean(v) for v in values], f"C{colour}.{style}", label=label, zorder=3 + (what == "swapped")
            )
            panel.fill_between(
                places, [min(v) for v in values], [max(v) for v in values], color=f"C{colour}", alpha=0.2
            )
        panel.axhline(mean(rows[0]["bits"]["context"]), color="black", linestyle="--", label="passage in context")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("times the passage was read", fontsize=9)
    axes[0, 0].set_ylabel("bits per byte of the answer", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("knowledge", __doc__)
    add_data(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(argv)
    run("knowledge", options, lambda: report(options.data, options.models), page, draw)


if __name__ == "__main__":
    main()
