"""A pretrained model reads novels it never saw: what it gains there, and forgets of the children's stories it knows.

    python -m recipes.pretrained_reading

The bundled model of 260K parameters (TinyStories) is converted without any old text: it samples some itself, anew for
every seed. It reads 49,152 tokens of each of two novels, with a context of 512 tokens. Gain: nats per token over the
second half against the same model frozen. Forgetting: rise of the loss on the 40 bundled stories with the fast weights
after `reset_context()`. The rate of every setting was chosen on Moby-Dick with seed 0 (the largest tried there that
forgets less than 1 %) and then frozen; the default of `convert_to_cms` is the first line. The third line has the ratios
of the per-token rates of the first. Three seeds differ in the sampled text only: there is one checkpoint.
"""

from __future__ import annotations

import argparse
import lzma
import re
from pathlib import Path

import torch
from torch import Tensor

from nestling.data import bundled_text
from nestling.evals.reading import read_text
from nestling.evals.statistics import interval, paired
from nestling.memories.continuum import InnerRule
from recipes.cells import Cell, cell, rounded, write_result

DATA = Path(__file__).parents[1] / "tests" / "hf" / "data"
RUNS = Path("runs/pretrained_reading")
TEXTS, TOKENS = ("emma", "sherlock_holmes"), 49_152
THREE, SAME = (256, 512, 1024), (256, 256, 256)
SETTINGS: dict[str, tuple[tuple[int, ...], tuple[float, ...], float]] = {  # periods, rates, decay per write
    "three periods": (THREE, (0.08, 0.08, 0.08), 0.03),
    "one period": ((256,), (0.1,), 0.03),
    "one period, slow layers less": (SAME, (0.2, 0.1, 0.05), 0.03),
    "three periods, no decay": (THREE, (0.015, 0.015, 0.015), 0.0),
}


def known_stories() -> list[Tensor]:
    """The 40 bundled stories, ids (1, n) each."""
    from nestling.hf.llama2c import read_tokenizer

    tokenizer = read_tokenizer(DATA / "tok512.bin.xz")
    stories = lzma.decompress((DATA / "stories_40.txt.xz").read_bytes()).decode("utf-8")
    return [torch.from_numpy(tokenizer.encode(story))[None] for story in re.split(r"(?<!\n)\n(?!\n)", stories)]


@torch.no_grad()
def stories_loss(model, stories: list[Tensor], state=None) -> float:  # type: ignore[no-untyped-def]
    """Mean nats per token over stories (1, n), each read alone with the fast weights of a state, all frozen."""
    learned = None if state is None else state.reset_context()
    nats = [
        torch.nn.functional.cross_entropy(model(ids, learned, learn=False).logits[0, :-1], ids[0, 1:], reduction="sum")
        for ids in stories
    ]
    return float(torch.stack(nats).sum()) / sum(ids.shape[1] - 1 for ids in stories)


def measure(name: str, text: str, seed: int) -> Cell:
    """One setting, novel and seed."""
    from nestling.hf import convert_to_cms
    from nestling.hf.llama2c import read_model, read_tokenizer
    from nestling.hf.own_text import own_text

    tokenizer = read_tokenizer(DATA / "tok512.bin.xz")
    known = known_stories()
    book = torch.from_numpy(tokenizer.encode(bundled_text(text)))[None, : TOKENS + 1]
    periods, rates, decay = SETTINGS[name]
    plain = read_model(DATA / "stories260K.bin.xz")
    old = own_text(plain, seed=seed)
    model = convert_to_cms(plain, periods, rates=rates, rule=InnerRule(decay=decay), old_text=old).reader
    frozen, learned = (read_text(model, book, learn=learn, call_size=1024) for learn in (False, True))
    before, after = stories_loss(model, known), stories_loss(model, known, learned.state)
    return {
        "frozen": frozen.nats(0.5),
        "learned": learned.nats(0.5),
        "gain": 100 * (1 - learned.nats(0.5) / frozen.nats(0.5)),
        "stories": before,
        "forgetting": 100 * (after / before - 1),
    }


def main() -> None:
    """Every cell, the table and the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, metrics = list(range(args.seeds)), Cell()
    for text in TEXTS:
        cells = {
            name: [
                cell(RUNS, f"{text}-{name.replace(' ', '_')}-{seed}", lambda n=name, s=seed: measure(n, text, s))  # type: ignore[misc] # noqa: B023
                for seed in seeds
            ]
            for name in SETTINGS
        }
        metrics[text] = {name: summary(rows, cells["three periods"]) for name, rows in cells.items()}
        for name, row in metrics[text].items():
            print(
                f"{text:16} {name:34} gain {row['gain']['mean']:5.1f} %  forgetting {row['forgetting']['mean']:5.2f} %"
            )
    config = {"texts": TEXTS, "tokens": TOKENS, "settings": SETTINGS}
    print(write_result("pretrained_reading", config, seeds, rounded(metrics)))


def summary(rows: list[Cell], first: list[Cell]) -> Cell:
    """Means with 95 % intervals over the seeds, and the paired difference to the first setting."""
    made: Cell = {"cells": rows}
    for key in ("gain", "forgetting"):
        mine, theirs = [row[key] for row in rows], [row[key] for row in first]
        made[key] = vars(interval(mine))
        made[f"{key}_less_three_periods"] = None if rows is first else vars(paired(mine, theirs))
    return made


if __name__ == "__main__":
    main()
