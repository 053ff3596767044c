"""In-context recall of real text: models trained to say parts of a document again, and the language models that exist.

    python -m recipes.it_learns --steps 3000 --seeds 3 --models transformer hope-attention    # for the last lines
    python -m recipes.it_learns --steps 1250 --seeds 3 --models transformer hope
    python -m recipes.in_context_recall --data DIR      # DIR/evals/squad_dev.jsonl.xz, DIR/cl/dbpedia14_10.jsonl.xz
    python -m recipes.in_context_recall --models hope gated-delta-net --data DIR
    python -m recipes.in_context_recall --table               # the committed result as a table
    python -m recipes.in_context_recall --figure              # and as docs/figures/in_context_recall.png

The tasks of nestling/evals/in_context_recall.py. Every batch is half records, half cloze, of training titles, with
the loss on all tokens and, as much again, on the asked ones. Equal parameters (within 2 %), documents, order and seeds.
Rates: the same three for every model, one seed, by bits on the validation titles. Test titles are read once, here, at
the trained length and at twice that. The language models that `it_learns` trained on a megabyte of Shakespeare, and the
bundled pretrained one, are asked the same as they are. Without the document, the same questions say how much a model
knows anyway: a class of DBpedia is one of ten.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.data import BPETokenizer, ByteTokenizer, Tokenizer, locate, read_passages
from nestling.data.questions import SQUAD
from nestling.evals import interval, needle_score, paired, verdict
from nestling.evals.in_context_recall import DBPEDIA, Recall, cloze, part, read_entries, records
from nestling.evals.protocol import Reads
from nestling.evals.statistics import Interval
from nestling.evals.suite import NOTHING, Examples
from nestling.models import LanguageModel, config_of, count, from_config, matched
from recipes import common_sense
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import add_data, parser_of, run
from recipes.fitting import fit

MODELS = ("hope", "gated-delta-net", "transformer", "titans-lmm")
SHAPE = {"vocab_size": 512, "dim": 64, "depth": 2, "heads": 2}
RATES = (1e-2, 5e-3, 2e-2)
STEPS, ROWS, LENGTHS, SEEDS = 600, 6, (32, 64), (0, 1, 2)  # rows of each task in a batch
BINS = (LENGTHS, (65, 128))
VALIDATED, TESTED, SEED = 64, 96, 10_000
BYTES = (160, 256)  # documents for models that read bytes
TASKS = ("records", "cloze")
RUNS = Path("runs/in_context_recall")


# --- data and models --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def pieces(folder: str | None) -> Tokenizer:
    """Byte pairs learned on the training titles."""
    entries = part(read_entries(locate(DBPEDIA, folder)), "training")
    passages = part(read_passages(locate(SQUAD, folder)), "training")
    texts = [f"{e.title} / kind: {e.kind}\n{e.title} / about: {e.about}\n" for e in entries]
    return BPETokenizer.train([*texts, *(p.text for p in passages)], SHAPE["vocab_size"])


def tasks(name: str, tokenizer: Tokenizer, folder: str | None) -> dict[str, Recall]:
    """Both tasks on a part of the titles."""
    return {
        "records": records(part(read_entries(locate(DBPEDIA, folder)), name), tokenizer),
        "cloze": cloze(part(read_passages(locate(SQUAD, folder)), name), tokenizer),
    }


def make(name: str) -> LanguageModel:
    """A model with the parameters of `hope`; CMS levels are frozen: there is no next token that they could learn."""
    shape: Cell = SHAPE | {"periods": (math.inf,), "inner_lr": 0.0}
    return from_config(matched(config_of(name, **shape), count(config_of("hope", **shape))))


def batch(made: dict[str, Recall], seed: int) -> Examples:
    """Half of each task."""
    parts = [task.examples(ROWS, LENGTHS, seed) for task in made.values()]
    size = max(p.tokens.shape[1] for p in parts)
    tokens, targets = (
        torch.cat([F.pad(t, (0, size - t.shape[1]), value=value) for t in given])
        for given, value in (([p.tokens for p in parts], 0), ([p.targets for p in parts], NOTHING))
    )
    return Examples(tokens, targets)


def loss_on(model: Reads, examples: Examples) -> Tensor:
    """Cross-entropy in nats: the mean over the asked tokens, plus the mean over all."""
    logits = model(examples.tokens).logits
    asked = F.cross_entropy(logits.flatten(0, 1), examples.targets.flatten(), ignore_index=NOTHING)
    after = torch.where(examples.tokens[:, 1:] > 0, examples.tokens[:, 1:], NOTHING)  # token 0 is padding
    return asked + F.cross_entropy(logits[:, :-1].flatten(0, 1), after.flatten(), ignore_index=NOTHING)


# --- cells ------------------------------------------------------------------------------------------------------


def run_cell(name: str, lr: float, seed: int, folder: str | None) -> Cell:
    """Train one model and ask it about the validation titles."""

    def work() -> Cell:
        torch.manual_seed(seed)
        model, training = make(name), tasks("training", pieces(folder), folder)
        loss = fit(model, lambda step: loss_on(model, batch(training, seed * 1_000_003 + step)), steps=STEPS, lr=lr)
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), RUNS / f"{name}-{lr:g}-{seed}.pt")
        asked = tasks("validation", pieces(folder), folder).values()
        found = [needle_score(model.eval(), task, VALIDATED, LENGTHS, seed=SEED) for task in asked]
        return {"loss": loss, "parameters": model.num_parameters(), "validation bits": [s.bits for s in found]}

    return cell(RUNS, f"{name}-{lr:g}-{seed}", work)


def test_cell(name: str, lr: float, seed: int, folder: str | None) -> Cell:
    """Ask a trained model about the test titles."""

    def work() -> Cell:
        model = make(name)
        model.load_state_dict(torch.load(RUNS / f"{name}-{lr:g}-{seed}.pt", weights_only=True))
        return {f"{low}-{high}": asked(model.eval(), pieces(folder), (low, high), folder) for low, high in BINS}

    return cell(RUNS, f"{name}-{lr:g}-{seed}-test", work)


def untrained_cell(name: str, seed: int, folder: str | None) -> Cell:
    """Ask a language model that was not trained for this."""

    def work() -> Cell:
        model, tokenizer, _ = common_sense.reader(name, seed)
        lengths = BYTES if isinstance(tokenizer, ByteTokenizer) else BINS[-1]
        return asked(model, tokenizer, lengths, folder)

    return cell(RUNS, f"as-it-is-{name.replace(', ', '-')}-{seed}", work)


def asked(model: Reads, tokenizer: Tokenizer, lengths: tuple[int, int], folder: str | None) -> Cell:
    """Share of right values in percent and bits per asked token, with the document and without."""
    made: Cell = {}
    for name, task in tasks("test", tokenizer, folder).items():
        for label, one in ((name, task), (f"{name}, no document", task.without_document())):
            found = needle_score(model, one, TESTED, lengths, seed=SEED)
            made[label] = {"right, %": 100 * found.value_share, "bits": found.bits, "values": found.values}
    return made


# --- table ------------------------------------------------------------------------------------------------------


def sweep(name: str, folder: str | None) -> Cell:
    """Bits on the validation titles of seed 0 by rate, mean of both tasks."""
    found = {f"{lr:g}": run_cell(name, lr, 0, folder) for lr in RATES}
    return {
        lr: {"bits": sum(c["validation bits"]) / 2, "loss": c["loss"], "cpu_seconds": c["cpu_seconds"]}
        for lr, c in found.items()
    }


def line(cells: Sequence[Cell]) -> Cell:
    """Intervals over the seeds of right values and of bits saved by the document."""
    made: Cell = {}
    for task in TASKS:
        alone = [c[f"{task}, no document"] for c in cells]
        made[task] = {
            "right, %": vars(interval([c[task]["right, %"] for c in cells])),
            "right without, %": vars(interval([c["right, %"] for c in alone])),
            "bits": vars(interval([c[task]["bits"] for c in cells])),
            "bits saved": vars(paired([c["bits"] for c in alone], [c[task]["bits"] for c in cells])),
        }
    return made


def report(folder: str | None, names: Sequence[str]) -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"sweep": {}, "chosen rate": {}, "models": {}, "hope against": {}, "as they are": {}}
    tests: dict[str, list[Cell]] = {}
    for name in names:
        swept = metrics["sweep"][name] = sweep(name, folder)
        bits = {rate: swept[f"{rate:g}"]["bits"] for rate in RATES}
        lr = metrics["chosen rate"][name] = min(bits, key=bits.__getitem__)
        trained = [run_cell(name, lr, seed, folder) for seed in SEEDS]
        tests[name] = [test_cell(name, lr, seed, folder) for seed in SEEDS]
        lines = {f"{low}-{high}": line([t[f"{low}-{high}"] for t in tests[name]]) for low, high in BINS}
        metrics["models"][name] = {"lines": lines, "trained": trained, "tested": tests[name]}
    for name in [n for n in names if n != "hope" and "hope" in names]:
        metrics["hope against"][name] = {task: against(tests["hope"], tests[name], task) for task in TASKS}
    for name, seeds in common_sense.MODELS.items():
        cells = [untrained_cell(name, seed, folder) for seed in seeds]
        metrics["as they are"][name] = {"line": line(cells), "cells": cells}
    config = {"steps": STEPS, "rows of each task": ROWS, "lengths": LENGTHS, "rates": RATES, "tested": TESTED} | SHAPE
    return write_result("in_context_recall", config, list(SEEDS), rounded(json.loads(json.dumps(metrics))))


def against(mine: Sequence[Cell], theirs: Sequence[Cell], task: str) -> Cell:
    """Paired differences in bits and in percent at the trained length, and the verdict on bits."""
    low, high = LENGTHS
    a, b = ([c[f"{low}-{high}"][task] for c in cells] for cells in (mine, theirs))
    bits, right = (paired([c[what] for c in a], [c[what] for c in b]) for what in ("bits", "right, %"))
    return {"bits": vars(bits), "right, %": vars(right), "verdict": verdict(bits)}


def page(result: Cell) -> str:
    """The result as markdown: right values in percent, with and without the document, and bits that it saves."""
    metrics = result["metrics"]
    lines = [
        "| model | tokens | records, % | without | bits saved | cloze, % | without | bits saved |",
        "|---" * 8 + "|",
    ]
    for name, made in metrics["models"].items():
        lines += [f"| {name} | {size} | {row(found)} |" for size, found in made["lines"].items()]
    for name, made in metrics["as they are"].items():
        lines.append(f"| {name}, as it is | | {row(made['line'])} |")
    for name, made in metrics["hope against"].items():
        said = ", ".join(f"{task} {found['verdict']} ({shown(found['bits'], 2)} bits)" for task, found in made.items())
        lines += ["", f"hope against {name}: {said}"]
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.1f} CPU minutes."])


def row(found: Cell) -> str:
    """One line of the table."""
    cells = []
    for task in TASKS:
        values = found[task]
        cells += [shown(values["right, %"], 1), f"{values['right without, %']['mean']:.1f}"]
        cells.append(shown(values["bits saved"], 2))
    return " | ".join(cells)


def shown(values: Cell, digits: int) -> str:
    """A mean with its interval, if it has one."""
    found = Interval(**values)
    if found.low is None or found.high is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def draw(result: Cell, path: Path) -> None:
    """Bits per asked token of the trained models, every seed a dot: with the document at both lengths, and without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = result["metrics"]["models"]
    sizes = [f"{low}-{high}" for low, high in BINS]
    kinds = {f"no document, {sizes[0]} tokens": (sizes[0], ", no document", "#7a7a7a")}
    kinds |= {f"document, {size} tokens": (size, "", f"C{i}") for i, size in enumerate(sizes)}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for panel, task in zip(axes, TASKS, strict=True):
        for offset, (label, (size, alone, colour)) in enumerate(kinds.items()):
            points = [(i, c[size][task + alone]["bits"]) for i, m in enumerate(models.values()) for c in m["tested"]]
            places = [i + 0.2 * (offset - 1) for i, _ in points]
            panel.plot(places, [bits for _, bits in points], ".", color=colour, label=label)
        panel.set_xticks(range(len(models)), models, fontsize=9)
        panel.set_ylim(0, panel.get_ylim()[1] + 0.5)
        panel.set_title(task, fontsize=10)
    axes[0].set_ylabel("bits per asked token", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncol=len(kinds))
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("in_context_recall", __doc__)
    add_data(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(argv)
    run("in_context_recall", options, lambda: report(options.data, options.models), page, draw)


if __name__ == "__main__":
    main()
