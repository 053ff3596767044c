"""Gain on a novel against forgetting of what a pretrained model knows, over rates: CMS writes and plain fine-tuning.

    python -m recipes.pretrained_frontier
    python -m recipes.pretrained_frontier --table        # the committed result as tables
    python -m recipes.pretrained_frontier --figure       # and as docs/figures/pretrained_frontier.png

The bundled model of 260K parameters (TinyStories) reads 24,576 tokens of each of two novels, 512 tokens of context at
most, and predicts every token before it learns from it. Gain: nats per token over the second half, against the model
frozen. Forgetting: rise of the loss on the 40 bundled stories, with what was learned and no context. Every way of
writing is read at rates a factor 2 apart until one forgets more than 6 %; ways are compared at
equal gain and at equal forgetting, by lines between points, so that no rate is chosen.

CMS: `convert_to_cms` with one thing changed. No setting sees a story: old keys and usual lengths come from text that
the model samples (seed 0), except in "keys of the reading alone". Fine-tuning: a step after every 256 tokens on their
mean loss, as often as the shortest period writes: SGD or AdamW on all weights, AdamW on LoRA of rank 8 (peft).

Second part: what a slower level keeps. Half of Emma is read, then as much of Sherlock Holmes, and then the next 8,192
tokens of Emma are scored with what is left, nothing in context and nothing written. Rates and decay per write are the
defaults for all; "long half-life" takes back as little per write as the slowest of the three levels does per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.data import bundled_text
from nestling.evals.frontier import Curve, Point, Setting
from nestling.evals.reading import ReadResult, gain_percent, read_text
from nestling.memories.continuum import InnerRule
from recipes.cells import Cell, cell, cpu_minutes, rounded, write_result
from recipes.command import parser_of, run
from recipes.pretrained_reading import DATA, known_stories, stories_loss

RUNS = Path("runs/pretrained_frontier")
TEXTS, TOKENS, NEXT, PERIOD, CONTEXT = ("emma", "sherlock_holmes"), 24_576, 8_192, 256, 512
STOP, GAINS, LOSSES = 6.0, (10.0, 15.0), (0.5, 1.0, 2.0)  # percent


@dataclass(frozen=True)
class Way:
    """One way of writing: `periods` and `ratios` of the rates, fast to slow, the rule, and the first rate to try."""

    first: float
    rule: InnerRule = InnerRule()
    periods: tuple[int, ...] = (PERIOD,)
    ratios: tuple[float, ...] = (1.0,)
    old_text: bool = True


DECAYED = InnerRule(decay=0.03)
THREE, SAME = (256, 1024, 4096), (256, 256, 256)
WAYS: dict[str, Way] = {
    "plain": Way(2.5e-5, InnerRule(kappa=0)),
    "erase": Way(0.0001, InnerRule(kappa=0, erase=0.5)),
    "decay": Way(0.0001, InnerRule(kappa=0, decay=0.03)),
    "old keys": Way(0.01),
    "old keys, erase": Way(0.02, InnerRule(erase=0.5)),
    "old keys, decay": Way(0.02, DECAYED),
    "keys of the reading alone, decay": Way(0.002, InnerRule(decay=0.03, online=True), old_text=False),
    "old keys and those of the reading, decay": Way(0.02, InnerRule(decay=0.03, online=True)),
    "two levels": Way(0.02, DECAYED, (256, 1024), (1.0, 1.0)),
    "three levels": Way(0.02, DECAYED, THREE, (1.0, 1.0, 1.0)),
    "control: one period, rates per token of three levels": Way(0.02, DECAYED, SAME, (1.0, 1 / 4, 1 / 16)),
}
TUNED = {"fine-tuning, SGD": 1e-4, "fine-tuning, AdamW": 2.5e-6, "LoRA, AdamW": 2.5e-5}  # the first rates to try
KEPT: dict[str, Way] = {
    "one period": Way(0.08, DECAYED),
    "three levels": Way(0.08, DECAYED, THREE, (1.0, 1.0, 1.0)),
    "control: rates per token of three levels": Way(0.08, DECAYED, SAME, (1.0, 1 / 4, 1 / 16)),
    "one period, long half-life": Way(0.08, InnerRule(decay=0.03 / 16)),
}


# --- reading ----------------------------------------------------------------------------------------------------


def converted(way: Way, rate: float) -> Any:
    """The bundled model as a reader that writes this way."""
    from nestling.hf import convert_to_cms
    from nestling.hf.llama2c import read_model
    from nestling.hf.own_text import own_text

    plain = read_model(DATA / "stories260K.bin.xz")
    old = own_text(plain, seed=0) if way.old_text else None
    rates = [rate * ratio for ratio in way.ratios]
    made = convert_to_cms(plain, way.periods, rates=rates, rule=way.rule, old_text=old, calibrate=way.old_text)
    return made.reader


def book(text: str) -> Tensor:
    """(1, n) ids of a bundled novel."""
    from nestling.hf.llama2c import read_tokenizer

    return torch.from_numpy(read_tokenizer(DATA / "tok512.bin.xz").encode(bundled_text(text)))[None]


def frozen(text: str) -> ReadResult:
    """The model as it is, over the text."""
    return read_text(converted(Way(0.01), 0.01), book(text)[:, : TOKENS + 1], learn=False)


def written(way: Way, rate: float, text: str) -> tuple[ReadResult, float]:
    """A reading that writes, and the loss on the stories after it."""
    reader = converted(way, rate)
    learned = read_text(reader, book(text)[:, : TOKENS + 1])
    return learned, stories_loss(reader, known_stories(), learned.state)


# --- fine-tuning ------------------------------------------------------------------------------------------------


def tuned(name: str, rate: float, text: str) -> tuple[Tensor, float]:
    """Losses (1, TOKENS) of a model fine-tuned on what it has read so far, and the loss on the stories after it."""
    from nestling.hf.llama2c import read_model

    model = read_model(DATA / "stories260K.bin.xz")
    if name.startswith("LoRA"):
        model = with_lora(model)
    optimizer = (torch.optim.SGD if name.endswith("SGD") else torch.optim.AdamW)(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    losses = []
    for window, asked in windows(book(text)[:, : TOKENS + 1]):
        logits = model(window[:, :-1]).logits[0, -asked:]
        one = F.cross_entropy(logits, window[0, -asked:], reduction="none")
        optimizer.zero_grad()
        one.mean().backward()
        optimizer.step()
        losses.append(one.detach())
    return torch.cat(losses)[None], stories_loss(lambda ids, *_, **__: model(ids), known_stories())


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters of rank 8 on every linear map of the blocks."""
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def windows(tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Windows (1, n + 1) of at most CONTEXT tokens, and how many of the last ones are new in each."""
    for start in range(0, tokens.shape[1] - 1, PERIOD):
        end = min(start + PERIOD, tokens.shape[1] - 1)
        yield tokens[:, max(0, end - CONTEXT) : end + 1], end - start


# --- cells ------------------------------------------------------------------------------------------------------


def point(name: str, rate: float, text: str) -> Cell:
    """Gain and forgetting of one way at one rate."""

    def work() -> Cell:
        if name in WAYS:
            learned, after = written(WAYS[name], rate, text)
            nats = learned.nats(0.5)
        else:
            losses, after = tuned(name, rate, text)
            nats = float(losses[:, TOKENS // 2 :].double().mean())
        return {"rate": rate, "nats": nats, "stories": after}

    return cell(RUNS, f"{text}-{plain_name(name)}-{rate:g}", work)


def plain_name(name: str) -> str:
    """A name as a file's."""
    return "".join(c if c.isalnum() else "_" for c in name)


def before(text: str) -> Cell:
    """The frozen model: nats on the second half, and on the stories."""

    def work() -> Cell:
        reader = converted(Way(0.01), 0.01)
        return {"nats": frozen(text).nats(0.5), "stories": stories_loss(reader, known_stories())}

    return cell(RUNS, f"{text}-frozen", work)


def curve(name: str, text: str) -> Cell:
    """Points by rising rate until one forgets more than STOP, and what is read off the lines between them."""
    first = TUNED[name] if name in TUNED else WAYS[name].first
    still, points, cells = before(text), [], []
    for rate in (first * 2**i for i in range(10)):
        cells.append(point(name, rate, text))
        gain, lost = (
            (100 * (1 - cells[-1]["nats"] / still["nats"])),
            100 * (cells[-1]["stories"] / still["stories"] - 1),
        )
        points.append(Point(rate=rate, gain=gain, forgetting=lost))
        if lost > STOP:
            break
    way = WAYS.get(name, Way(0.0))
    setting = Setting(name=name, periods=way.periods, ratios=way.ratios)
    made = Curve(setting=setting, points=tuple(points), frozen=still["nats"], domain=still["stories"])
    return {
        "points": [asdict(p) for p in points],
        "gain at forgetting": {f"{x:g}": made.best_within(x) for x in LOSSES},
        "forgetting at gain": {f"{x:g}": forgetting_at(points, x) for x in GAINS},
        "cells": cells,
    }


def forgetting_at(points: Sequence[Point], gain: float) -> float | None:
    """Forgetting where the rising rate first gains `gain`, by lines between points; None if no rate gains so much."""
    path = [(0.0, 0.0), *((p.gain, p.forgetting) for p in points)]
    for (g0, f0), (g1, f1) in zip(path, path[1:], strict=False):
        if g0 < gain <= g1:
            return f0 + (gain - g0) / (g1 - g0) * (f1 - f0)
    return None


def kept(name: str) -> Cell:
    """Gains in percent on the next part of Emma, before and after another novel, and the price on the stories."""

    def work() -> Cell:
        way, half = KEPT[name], TOKENS // 2
        reader, emma, other = converted(way, way.first), book("emma"), book("sherlock_holmes")
        then = emma[:, half : half + NEXT]
        plain = read_text(reader, then, learn=False)
        first = read_text(reader, emma[:, :half]).state
        second = read_text(reader, other[:, :half], state=first.reset_context()).state
        gains = [
            gain_percent(read_text(reader, then, learn=False, state=s.reset_context()), plain, 0.0)
            for s in (first, second)
        ]
        stories = [stories_loss(reader, known_stories(), s) for s in (None, second)]
        return {"at once": gains[0], "after another novel": gains[1], "forgetting": 100 * (stories[1] / stories[0] - 1)}

    return cell(RUNS, f"kept-{plain_name(name)}", work)


# --- report -----------------------------------------------------------------------------------------------------


def report() -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"frozen": {text: before(text) for text in TEXTS}}
    metrics["kept"] = {name: kept(name) for name in KEPT}
    for name in (*WAYS, *TUNED):
        metrics.setdefault("ways", {})[name] = {text: curve(name, text) for text in TEXTS}
    config: Cell = {"texts": TEXTS, "tokens": TOKENS, "period": PERIOD, "context": CONTEXT, "tuned": TUNED}
    for part, ways in (("ways", WAYS), ("kept", KEPT)):
        config[part] = {name: asdict(way) for name, way in ways.items()}
    return write_result("pretrained_frontier", config, [0], rounded(metrics))


def page(result: Cell) -> str:
    """The result as markdown: both texts in each cell, Emma first."""
    metrics = result["metrics"]
    titles = [f"gain at {x:g} % forgotten" for x in LOSSES] + [f"forgotten at {x:g} % gain" for x in GAINS]
    lines = [f"| way of writing | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for name, curves in metrics["ways"].items():
        row = []
        for key in ("gain at forgetting", "forgetting at gain"):
            for x in curves[TEXTS[0]][key]:
                row.append(", ".join(shown(curves[text][key][x]) for text in TEXTS))
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        "| what is left of half of Emma | at once | after another novel | stories forgotten |",
        "|---|---|---|---|",
    ]
    for name, row in metrics["kept"].items():
        values = (row["at once"], row["after another novel"], row["forgetting"])
        lines.append(f"| {name} | {' | '.join(shown(x) for x in values)} |")
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.0f} CPU minutes."])


def shown(value: float | None) -> str:
    """Two digits after the point, or that no rate got there."""
    return "–" if value is None else f"{value:.2f}"


def draw(result: Cell, path: Path) -> None:
    """Gain against forgetting by rising rate, a panel for each text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axes, text in zip(panels, TEXTS, strict=True):
        for i, (name, curves) in enumerate(result["metrics"]["ways"].items()):
            points = [(0.0, 0.0), *((p["forgetting"], p["gain"]) for p in curves[text]["points"])]
            style = "--" if name in TUNED else "-"
            axes.plot(*zip(*points, strict=True), style, color=plt.cm.tab20(i), marker=".", linewidth=1.2, label=name)
        axes.axvline(1, color="black", linewidth=0.6)
        axes.axhline(15, color="black", linewidth=0.6)
        axes.set(xlim=(-1, 6), ylim=(0, None), xlabel="forgetting of the stories, %")
        axes.set_title(f"{text.replace('_', ' ')}, second half of {TOKENS:,} tokens", fontsize=10)
    panels[0].set_ylabel("gain, %")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("pretrained_frontier", __doc__)
    options = parser.parse_args(argv)
    run("pretrained_frontier", options, lambda: report(), page, draw)


if __name__ == "__main__":
    main()
