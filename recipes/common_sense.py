"""Common sense, zero-shot: ten benchmarks through lm-eval (extra `eval`), read by small models, which can only guess.

    python -m recipes.it_learns --steps 3000 --seeds 3 --models transformer hope-attention    # trains the models first
    python -m recipes.it_learns --steps 1250 --seeds 3 --models transformer hope
    python -m recipes.common_sense --data DIR                                       # DIR/evals/*.jsonl.xz
    python -m recipes.common_sense --table                    # the committed result as a table

The path of Table 2, not its numbers: models of half a million parameters that have read a megabyte of Shakespeare, and
the bundled one of 260 thousand that has read children's stories, know nothing that is asked here. The first 100 items
of each task; nothing learns inside a request. The Transformer has a window of its training length, the pretrained model
reads the last 512 tokens. There is one pretrained checkpoint, so its intervals are over items only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from nestling.data import ByteTokenizer, Tokenizer
from nestling.evals import as_lm, common_sense, interval
from nestling.evals.common_sense import PREFIX, REPORTED, TASKS, reported
from nestling.models import ReadingModel
from recipes import it_keeps_learning as reading
from recipes import it_learns
from recipes import pretrained_reading as pretrained
from recipes import what_limits_reading as limits
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, newest

LIMIT, SEEDS = 100, (0, 1, 2)
STEPS = {"transformer": 3000, "hope-attention": 3000, "hope": 1250}
PRETRAINED, CONTEXT = "stories260K, converted", 512
MODELS = {name: SEEDS for name in STEPS} | {PRETRAINED: SEEDS[:1]}
AVERAGED = ("lambada", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "siqa", "boolq")  # of the paper
RUNS = Path("runs/common_sense")


def reader(name: str, seed: int) -> tuple[ReadingModel, Tokenizer, int | None]:
    """A model, its tokenizer, and how many tokens of a request it reads (None = all)."""
    if name == PRETRAINED:
        from nestling.hf import convert_to_cms
        from nestling.hf.llama2c import read_model, read_tokenizer

        plain = read_model(pretrained.DATA / "stories260K.bin.xz")
        model = convert_to_cms(plain, pretrained.THREE, rates=0.001, calibrate=False).reader  # reads, never writes
        return model, read_tokenizer(pretrained.DATA / "tok512.bin.xz"), CONTEXT
    return reading.trained(name, STEPS[name], limits.LR, seed, it_learns.DEPTH)[0], ByteTokenizer(), None


def run_cell(name: str, seed: int, folder: str | None) -> Cell:
    """All tasks of one model: value, standard error, chance, n, and the items as a string of 0 and 1."""

    def work() -> Cell:
        model, tokenizer, longest = reader(name, seed)
        found = common_sense(as_lm(model, tokenizer, max_length=longest), data=folder, limit=LIMIT)
        made: Cell = {"perplexity of lambada": next(a.value for a in found if a.metric == "perplexity")}
        for one in reported(found):
            made[one.task.removeprefix(PREFIX)] = {
                "value": one.value,
                "stderr": one.stderr,
                "chance": one.chance,
                "n": one.n,
                "version": one.version,
                "items": "".join(str(int(item)) for item in one.items),
            }
        return made

    return cell(RUNS, f"{name.replace(', ', '-')}-{seed}", work)


def summary(cells: Sequence[Cell]) -> Cell:
    """Of each task and of the paper's average: the mean in percent, less chance, over seeds and over items."""
    made: Cell = {}
    for task in REPORTED:
        scores = [c[task] for c in cells]
        right = [sum(map(int, item)) / len(scores) for item in zip(*(s["items"] for s in scores), strict=True)]
        made[task] = less_chance([[s["value"] for s in scores], right], scores[0]["chance"])
    over_seeds = [mean([c[task]["value"] for task in AVERAGED]) for c in cells]
    by_item = [
        mean([float(c[task]["items"][i]) for c in cells for task in AVERAGED])
        for i in range(min(c[task]["n"] for c in cells for task in AVERAGED))
    ]
    made["average"] = less_chance([over_seeds, by_item], mean([cells[0][task]["chance"] for task in AVERAGED]))
    return made | {"perplexity of lambada": [c["perplexity of lambada"] for c in cells]}


def less_chance(values: Sequence[Sequence[float]], chance: float) -> Cell:
    """Percent, and percent above chance with intervals over seeds and over items."""
    seeds, items = ([100 * (v - chance) for v in part] for part in values)
    return {
        "percent": 100 * mean(values[0]),
        "chance": 100 * chance,
        "over seeds": vars(interval(seeds)),
        "over items": vars(interval(items)),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(folder: str | None) -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"models": {}}
    for name, seeds in MODELS.items():
        cells = [run_cell(name, seed, folder) for seed in seeds]
        metrics["models"][name] = {"summary": summary(cells), "cells": cells}
    config = {"items": LIMIT, "tasks": TASKS, "reported": REPORTED, "steps": STEPS, "averaged": AVERAGED}
    return write_result("common_sense", config, list(SEEDS), rounded(json.loads(json.dumps(metrics))))


def page(result: Cell) -> str:
    """The result as markdown: percent, and in brackets the interval of percent above chance, over seeds and items."""
    models = result["metrics"]["models"]
    lines = [f"| task | chance | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    for task in (*REPORTED, "average"):
        rows = [made["summary"][task] for made in models.values()]
        label = f"**average of {len(AVERAGED)}**" if task == "average" else f"{task} ({REPORTED[task]})"
        lines.append(f"| {label} | {rows[0]['chance']:.1f} | {' | '.join(shown(row) for row in rows)} |")
    ends = [mean(made["summary"]["perplexity of lambada"]) for made in models.values()]
    lines.append(f"| perplexity of LAMBADA's last words | | {' | '.join(f'{value:.2g}' for value in ends)} |")
    lines += ["", "Percent; in brackets the 95 % interval of percent above chance, over seeds; over items.", ""]
    return "\n".join([*lines, f"{cpu_minutes(result['metrics']):.1f} CPU minutes."])


def shown(row: Cell) -> str:
    """12.3 [-1.0, 2.0; -4.0, 5.0]"""
    spans = [row[over] for over in ("over seeds", "over items") if row[over]["low"] is not None]
    bounds = "; ".join(f"{span['low']:.1f}, {span['high']:.1f}" for span in spans)
    return f"{row['percent']:.1f} [{bounds}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--table", action="store_true", help="print the newest committed result, run nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.table:
        print(report(options.data))
    print(page(newest("common_sense")))


if __name__ == "__main__":
    main()
