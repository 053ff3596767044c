"""Classes that come a few at a time, learned in one pass: what is left of all of them at the end, by method.

    python -m recipes.class_incremental --data DIR                 # DIR/cl; needs the extra `test` (transformers, peft)
    python -m recipes.class_incremental --data DIR --sets CLINC150 --seeds 1
    python -m recipes.class_incremental --table                    # the committed result as tables
    python -m recipes.class_incremental --figure                   # and as docs/figures/class_incremental.png

The backbone is the bundled pretrained model of 260,032 parameters (TinyStories). Every method sees every text once, in
the same order and the same batches, with the same features and a linear map to the classes seen so far
(continual_methods/classifier.py); it is asked for the class among all classes seen so far, never told the task.

* "trained head": the head is learned by the method's own rule. In Hope it is one more level, with the old-key metric
  that the stream itself accumulates.
* "memory head": for every method the head is the same associative memory (continual_methods/memory_head.py), written
  batch by batch after it was read; methods differ in what they do to the backbone. "frozen" does nothing to it (with
  a trained head: with that of Hope).
* "frozen features": nearest class mean, LDA, KLDA: no gradient anywhere. "in context": nothing is written at all.

Hope-1, -2, -3: the MLPs of the backbone are levels with periods of 10; 10 and 40; 10, 40 and 160 texts. "one period":
the levels of Hope-3, all with a period of 10, at its rates per text. One number
of each method (a rate, EWC's strength, a width) is the best of three on validation texts of CLINC150 with one seed, by
average accuracy at the end of a shorter stream; then it is frozen for all sets. EWC has the rate of sequential
fine-tuning, Hope-2 and Hope-3 have the rate of Hope-1. The metric's strength in the trained head of Hope (kappa 1) was
chosen on the same validation texts, among about twenty settings of rate, kappa and loss, on frozen features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.evals.continual import continual, mean
from nestling.evals.statistics import paired
from recipes.cells import Cell, cell, rounded, write_result
from recipes.class_incremental_page import CONTEXT, FROZEN, draw, page
from recipes.class_methods import (
    BATCH,
    BUFFER,
    FISHER,
    HEAD,
    HEADS,
    LEVELS,
    METHODS,
    RIDGE,
    ROWS,
    SHARE,
    Row,
    make,
    pretrained,
)
from recipes.class_tasks import LONGEST, SIZES, Example, Stream, load_texts, stream
from recipes.command import add_data, parser_of, run
from recipes.continual_methods.classifier import Classifier, labels_of
from recipes.continual_methods.cms import CmsWrites
from recipes.continual_methods.fine_tuning import Method
from recipes.continual_methods.gaussian import FourierFeatures, Gaussians

RUNS = Path("runs/class_incremental")
JOINT_PASSES, FOURIER = 3, 1024
CHOOSING, CHOOSING_SEED, CHOOSING_TEXTS = "CLINC150", 100, 8  # texts per class
CANDIDATES, EACH, ASKED = 3, 2, 50  # of InCA: classes, examples of each; queries put to a model in context


# --- cells ------------------------------------------------------------------------------------------------------


def learn_stream(
    row: Row, value: float, rate: float, tasks: Stream, asked: Sequence[list[Example]], seed: int, *, end_only: bool
) -> Cell:
    """The accuracy on every task after each (or at the end only), 0 where its classes have not come yet."""
    own = own_text_of()
    if row.head == FROZEN:
        return {"accuracy": frozen_features(row.method, value, tasks, asked, own, seed)}
    classifier, method = make(row, value, rate, len(tasks.names), own, seed)
    if row.method == "joint":
        return {"accuracy": joint(classifier, method, tasks, asked, seed)}
    accuracy = []
    for t, examples in enumerate(tasks.train):
        if classifier.memory is None:
            classifier.expect(examples)
        method.learn(examples)
        if end_only and t < len(tasks.train) - 1:
            continue
        with method.reading():
            accuracy.append(so_far(asked, t, lambda part: mean(classifier.correct(part))))
    moved = method.moved() if isinstance(method, CmsWrites) else {}
    return {"accuracy": accuracy, "moved": moved}


def so_far(asked: Sequence[list[Example]], t: int, score: Callable[[list[Example]], float]) -> list[float]:
    """Scores on tasks 0 to t; a class that has not come cannot be found."""
    return [score(part) if j <= t else 0.0 for j, part in enumerate(asked)]


def joint(
    classifier: Classifier, method: Method, tasks: Stream, asked: Sequence[list[Example]], seed: int
) -> list[list[float]]:
    """All tasks at once, shuffled, in several passes: one row."""
    every = [example for part in tasks.train for example in part]
    classifier.expect(every)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(JOINT_PASSES):
        method.learn([every[i] for i in torch.randperm(len(every), generator=generator).tolist()])
    return [[mean(classifier.correct(part)) for part in asked]]


@cache
def own_text_of() -> Tensor:
    """Text that the bundled model samples; the same for every seed, because it is the model's."""
    from nestling.hf.own_text import own_text

    return own_text(pretrained()[0], seed=0)


@torch.no_grad()
def all_features(classifier: Classifier, parts: Sequence[Sequence[Example]]) -> list[Tensor]:
    """Features of each part's texts, (n, F)."""
    made = []
    for part in parts:
        texts = [text for text, _ in part]
        made.append(torch.cat([classifier.features(texts[i : i + 50]) for i in range(0, len(texts), 50)]))
    return made


def frozen_features(
    name: str, value: float, tasks: Stream, asked: Sequence[list[Example]], own: Tensor, seed: int
) -> list[list[float]]:
    """Gaussians over the features of the untouched model."""
    classifier = Classifier(pretrained()[0], own, len(tasks.names), None)
    train, test = all_features(classifier, tasks.train), all_features(classifier, asked)
    if name == "KLDA":
        fourier = FourierFeatures(train[0].shape[1], FOURIER, width=value, seed=seed)
        train, test = [fourier(x) for x in train], [fourier(x) for x in test]
    ridge = 1e-3 if name == "KLDA" else value
    memory = Gaussians(train[0].shape[1], len(tasks.names))
    accuracy = []
    for t, (x, examples) in enumerate(zip(train, tasks.train, strict=True)):
        memory.write(x, labels_of(examples))
        row = []
        for j, (y, part) in enumerate(zip(test, asked, strict=True)):
            if j > t:
                row.append(0.0)
                continue
            scores = memory.nearest_mean(y) if name == "nearest mean" else memory.discriminants(y, ridge)
            row.append((scores.argmax(-1) == labels_of(part)).double().mean().item())
        accuracy.append(row)
    return accuracy


def in_context(row: Row, tasks: Stream, seed: int) -> Cell:
    """Accuracy at the end only, on the first `ASKED` test texts of all tasks taken in turn."""
    from recipes.continual_methods.in_context import Prompter, Shown

    model, tokenizer = pretrained()
    encode = encoder(tokenizer, special=False)
    names = [name.replace("_", " ") for name in tasks.names]
    prompter = Prompter(model, encode, 1, names)
    pool = [Shown(cut(text), label) for part in tasks.shown for text, label in part]
    queries = [pair for same in zip(*(spread(part) for part in tasks.asked), strict=False) for pair in same][:ASKED]
    if row.method == "ICL":
        every = list(range(len(names)))
        right = [prompter.in_context(cut(t), pool, every, seed * 1000 + i) == y for i, (t, y) in enumerate(queries)]
        return {"final": mean(right)}
    whole = encoder(tokenizer)
    classifier = Classifier(model, own_text_of(), len(names), None)
    memory = Gaussians(model.config.num_hidden_layers * model.config.hidden_size, len(names))
    for x, examples in zip(all_features(classifier, tasks.train), tasks.train, strict=True):
        memory.write(x, labels_of(examples))
    (features,) = all_features(classifier, [[(whole(text)[:LONGEST], label) for text, label in queries]])
    best = memory.discriminants(features, row.values[0]).topk(CANDIDATES).indices.tolist()
    right = [
        prompter.inca(cut(text), pool, candidates, EACH, seed * 1000 + i) == label
        for i, ((text, label), candidates) in enumerate(zip(queries, best, strict=True))
    ]
    kept = [label in candidates for (_, label), candidates in zip(queries, best, strict=True)]
    return {"final": mean(right), "among candidates": mean(kept)}


def spread(pairs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same pairs, the classes in turn."""
    by_class: dict[int, list[tuple[str, int]]] = {}
    for pair in pairs:
        by_class.setdefault(pair[1], []).append(pair)
    return [pair for same in zip(*by_class.values(), strict=False) for pair in same]


def cut(text: str) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:16])


def encoder(tokenizer: Any, *, special: bool = True) -> Callable[[str], Tensor]:
    return lambda text: torch.from_numpy(tokenizer.encode(text, add_special_tokens=special))


def tasks_of(name: str, folder: str | None, seed: int, *, tuning: bool) -> Stream:
    size = SIZES[name]
    size = replace(size, train=CHOOSING_TEXTS) if tuning else size
    return stream(load_texts(name, folder), size, encoder(pretrained()[1]), seed)


def run_cell(row: Row, value: float, rate: float, name: str, seed: int, folder: str | None, *, tuning: bool) -> Cell:
    """One method on one data set and seed; tuning: fewer texts, and asked about validation texts at the end."""
    kind = "choose" if tuning else "test"
    label = f"{kind}-{name}-{row.head}-{row.method}-{value:g}-{seed}".replace(" ", "_")

    def work() -> Cell:
        tasks = tasks_of(name, folder, seed, tuning=tuning)
        if row.head == CONTEXT:
            return in_context(row, tasks, seed)
        asked = tasks.validation if tuning else tasks.test
        return learn_stream(row, value, rate, tasks, asked, seed, end_only=tuning)

    return cell(RUNS, label, work)


# --- table ------------------------------------------------------------------------------------------------------


def chosen(row: Row, rate: float, folder: str | None) -> tuple[float, dict[str, float]]:
    """The value with the best average accuracy on validation texts, the first among equals; and all of them."""
    if len(row.values) == 1:
        return row.values[0], {}
    row = replace(row, method="Hope-1") if row.method in LEVELS else row
    found = {}
    for value in row.values:
        made = run_cell(row, value, rate, CHOOSING, CHOOSING_SEED, folder, tuning=True)
        found[f"{value:g}"] = mean(made["accuracy"][-1])
    return max(row.values, key=lambda value: found[f"{value:g}"]), found


def report(rows: Sequence[Row], sets: Sequence[str], seeds: int, folder: str | None) -> Path:
    """Run what is missing, and write the result."""
    values: dict[tuple[str, str], tuple[float, float]] = {}
    metrics: Cell = {"tried": {}, "chosen": {}, "sets": {}}
    for row in sorted(rows, key=lambda row: row.method == "EWC"):  # EWC needs the rate of sequential
        rate = values[row.head, "sequential"][0] if row.method == "EWC" else 0.0
        value, found = chosen(row, rate, folder)
        values[row.head, row.method] = value, rate
        metrics["tried"][title(row)], metrics["chosen"][title(row)] = found, value
    for name in sets:
        metrics["sets"][name] = {}
        for row in rows:
            value, rate = values[row.head, row.method]
            cells = [run_cell(row, value, rate, name, seed, folder, tuning=False) for seed in range(seeds)]
            metrics["sets"][name][title(row)] = summary(cells)
        metrics["sets"][name] |= {"differences": differences(metrics["sets"][name])}
    config: Cell = {"batch": BATCH, "buffer": BUFFER, "fisher": FISHER, "ridge": RIDGE, "joint passes": JOINT_PASSES}
    config |= {"longest": LONGEST, "sizes": {name: asdict(SIZES[name]) for name in sets}, "levels": LEVELS}
    config |= {"fourier": FOURIER, "inca": [CANDIDATES, EACH, ASKED]}
    config["chosen on"] = [CHOOSING, CHOOSING_SEED, CHOOSING_TEXTS]
    config["head of Hope"] = {"kappa": HEAD.kappa, "online": HEAD.online, "share of the backbone": SHARE}
    return write_result("class_incremental", config, list(range(seeds)), rounded(metrics))


def title(row: Row) -> str:
    return f"{row.method}, {row.head}"


def summary(cells: Sequence[Cell]) -> Cell:
    """The accuracies of every seed, and their averages in percent."""
    made: Cell = {"cells": list(cells), "final": [100 * final(c) for c in cells]}
    if len(cells[0].get("accuracy", ())) > 1:
        numbers = [continual(c["accuracy"]).to_dict() for c in cells]
        made |= {key: [100 * n[key] for n in numbers] for key in ("learned", "forgetting", "backward_transfer")}
    return made


def final(made: Cell) -> float:
    """Average accuracy over all tasks at the end."""
    return made["final"] if "final" in made else mean(made["accuracy"][-1])


def differences(rows: Cell) -> Cell:
    """Hope less each other row, paired by seed, in points of average accuracy at the end."""
    hopes = [name for name in rows if name.startswith("Hope")]
    return {
        hope: {other: vars(paired(rows[hope]["final"], made["final"])) for other, made in rows.items() if other != hope}
        for hope in hopes
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("class_incremental", __doc__)
    add_data(parser)
    parser.add_argument(
        "--sets", nargs="*", choices=tuple(SIZES), default=list(SIZES), help="none: only what is chosen is measured"
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    rows = [row for row in ROWS if row.head in options.heads and row.method in options.methods]
    run("class_incremental", options, lambda: report(rows, options.sets, options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
