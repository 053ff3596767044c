"""Continual pre-training through the writes: the rates of a converted model's levels and its MLP weights are learned.

    python -m recipes.write_training --data DIR          # DIR/lm: novels and stories
    python -m recipes.write_training --table             # the committed result as a table
    python -m recipes.write_training --figure            # and as docs/figures/write_training.png

The bundled model (260,032 parameters, TinyStories), converted at the defaults with periods of 256, 512 and 1,024, is
trained for 30 steps on one stream: 3,072 tokens of a novel, 1,024 of children's stories, and so on, with its levels
writing and their state carried on. Trained are the rates (one per layer, in log space), or rates and initial states
(the MLP weights that are written), first-order or exact through all writes of a step. "Stories asked": the stories are
not written but only predicted with what the novel wrote, and count ten times; first-order, because the exact gradient
ends where the levels stop to write. The control takes the same steps on the same MLP weights without writes. Then all
of them read the same way: two novels of other authors, 16,384 tokens each.

A larger rate gains and forgets more, so the untouched model and the control are also read at multiples of their rates,
and every training is compared with the line through these points at its own loss on the stories; the control has the
learning rate of the trainings with writes, and stands there once more with its own best. Learning rates (three
for the rates, three for the weights with and without writes) are those with the least "nats on Moby-Dick + 10 x nats on
the stories" with seed 0, first-order; the other trainings take them as they are. Seeds differ in the order of the text
and in the text that is sampled for the old keys.
"""

from __future__ import annotations

import lzma
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.data import load_documents
from nestling.evals.reading import read_text
from nestling.memories.continuum import continuum_levels
from recipes.cells import Cell, cell, rounded, write_result
from recipes.command import add_data, parser_of, run
from recipes.fitting import minimise
from recipes.pretrained_frontier import book, plain_name
from recipes.pretrained_reading import DATA, known_stories, stories_loss
from recipes.write_training_gaps import CONTROL, LINES, SEEDS, UNTRAINED, WEIGHT, difference
from recipes.write_training_page import draw, page

RUNS = Path("runs/write_training")
PERIODS, STEPS, NOVEL, STORIES, CHUNK = (256, 512, 1024), 30, 3072, 1024, 30_000  # tokens; characters of a novel
NOVELS = (
    "anna_karenina",
    "bleak_house",
    "brothers_karamazov",
    "david_copperfield",
    "don_quixote",
    "great_expectations",
    "little_women",
    "middlemarch",
    "vanity_fair",
    "war_and_peace",
)
TESTS, VALIDATION, TOKENS = ("emma", "sherlock_holmes"), "moby_dick", 16_384
FACTORS, RATE_LRS, STATE_LRS = (0.5, 1.0, 2.0, 4.0), (0.03, 0.1, 0.3), (1e-4, 3e-4, 1e-3)
WHOLE = 10**6  # more writes than there are: the exact gradient is cut at the ends of steps alone
OWN = "without writes, at its own best learning rate"


@dataclass(frozen=True)
class Training:
    """What is trained: `rates`, `states` (the MLP weights), with `writes` or without, exact or first-order; `asked`:
    the stories are asked, not written. `like`: the training whose learning rates it takes."""

    rates: bool = True
    states: bool = False
    writes: bool = True
    exact: bool = False
    asked: bool = False
    like: str = ""


RATES, BOTH = "rates, first-order", "rates and initial states, first-order"
TRAININGS = {
    RATES: Training(),
    "rates, exact": Training(exact=True, like=RATES),
    "rates, first-order, stories asked": Training(asked=True, like=RATES),
    BOTH: Training(states=True),
    "rates and initial states, exact": Training(states=True, exact=True, like=BOTH),
    "rates and initial states, first-order, stories asked": Training(states=True, asked=True, like=BOTH),
    CONTROL: Training(rates=False, states=True, writes=False, like=BOTH),
    OWN: Training(rates=False, states=True, writes=False),
}
PAIRS = (
    *((name, UNTRAINED) for name in TRAININGS),
    *((name, other) for name, t in TRAININGS.items() if t.states and t.writes for other in (CONTROL, OWN)),
    *((name, t.like) for name, t in TRAININGS.items() if t.writes and t.like),
)


# --- training ---------------------------------------------------------------------------------------------------


def converted(seed: int, *, exact: bool = False) -> Any:
    """The bundled model at the defaults of `convert_to_cms`, its rates to be learned."""
    from nestling.hf import convert_to_cms
    from nestling.hf.convert import RULE
    from nestling.hf.llama2c import read_model
    from nestling.hf.own_text import own_text

    plain = read_model(DATA / "stories260K.bin.xz")
    old, rule = own_text(plain, seed=seed), replace(RULE, learned=True)
    return convert_to_cms(plain, PERIODS, rule=rule, old_text=old, bptt=WHOLE if exact else 0).eval().reader


def stream(seed: int, folder: str | None) -> Iterator[Tensor]:
    """(NOVEL + STORIES,) ids: the begin-of-text token, part of a novel, that token, stories; without end."""
    from nestling.hf.llama2c import read_tokenizer

    encode, draw = read_tokenizer(DATA / "tok512.bin.xz").encode, random.Random(seed)
    texts = {name: "".join(load_documents(f"lm/gutenberg/{name}.txt.xz", folder)) for name in NOVELS}
    stories = training_stories("".join(load_documents("lm/tinystories_sample.txt.xz", folder)))
    names, tales = [], []  # type: ignore[var-annotated]
    while True:
        names = names or draw.sample(NOVELS, len(NOVELS))
        text = texts[names.pop()]
        start = draw.randrange(len(text) // 20, len(text) - CHUNK)  # not the list of contents
        novel = torch.from_numpy(encode(text[start : start + CHUNK]))[:NOVEL]
        told = torch.empty(0, dtype=torch.long)
        while len(told) < STORIES:
            tales = tales or draw.sample(stories, len(stories))
            told = torch.cat([told, torch.from_numpy(encode(tales.pop()))])
        yield torch.cat([novel, told[:STORIES]])


def training_stories(sample: str) -> list[str]:
    """The stories of the sample without the 40 that forgetting is measured on."""
    asked = lzma.decompress((DATA / "stories_40.txt.xz").read_bytes()).decode("utf-8")
    known, found = ({s.strip() for s in re.split(r"(?<!\n)\n(?!\n)", text)} for text in (asked, sample))
    assert known <= found
    return sorted(found - known - {""})


def train(model: Any, wanted: Training, lrs: tuple[float, float], seed: int, folder: str | None) -> None:
    """The steps; `lrs` of log rates and of weights."""
    levels, texts, state = continuum_levels(model), stream(seed, folder), None
    rates = [level.inner_log_rate for level in levels.values()]
    states = [m.weight for level in levels.values() for m in level.maps.values()]
    model.requires_grad_(False)
    parts = [(rates, wanted.rates, lrs[0]), (states, wanted.states, lrs[1])]
    groups: list[dict[str, Any]] = [{"params": p, "lr": lr, "weight_decay": 0.0} for p, chosen, lr in parts if chosen]
    for group in groups:
        for p in group["params"]:
            p.requires_grad_(True)
    border = torch.zeros(1, NOVEL + STORIES, dtype=torch.bool)
    border[0, [0, NOVEL]] = True  # the context starts again, what was written stays

    def loss_at(step: int) -> Tensor:
        nonlocal state
        tokens = next(texts)[None]
        targets = tokens.roll(-1, 1)
        targets[0, [NOVEL - 1, -1]] = -1
        if not wanted.asked:
            loss, state = model.loss(tokens, targets, state=state, new_document=border, learn=wanted.writes)
            return loss
        before = None if state is None else state.reset_context()
        loss, state = model.loss(tokens[:, :NOVEL], targets[:, :NOVEL], state=before)
        told = model.loss(tokens[:, NOVEL:], targets[:, NOVEL:], state=state.reset_context(), learn=False)[0]
        return loss + WEIGHT * told

    minimise(model, loss_at, STEPS, torch.optim.AdamW(groups), lambda step, steps: 1 - step / steps)


def training(name: str, lrs: tuple[float, float], seed: int, folder: str | None) -> Cell:
    """A training, run once; its weights are kept."""
    label = f"{plain_name(CONTROL if name == OWN else name)}-{lrs[0]:g}-{lrs[1]:g}-{seed}"

    def work() -> Cell:
        model = converted(seed, exact=TRAININGS[name].exact)
        train(model, TRAININGS[name], lrs, seed, folder)
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), RUNS / f"{label}.pt")
        return {"rates": rates_of(model), "weights": f"{label}.pt"}

    return cell(RUNS, f"train-{label}", work)


def trained(name: str, lrs: tuple[float, float], seed: int, folder: str | None) -> Any:
    """The model after a training; exact and first-order read alike."""
    model = converted(seed)
    if name != UNTRAINED:
        model.load_state_dict(torch.load(RUNS / training(name, lrs, seed, folder)["weights"], weights_only=True))
    return model


def rates_of(model: Any) -> list[float]:
    """The rate of every layer's level, first layer first."""
    return [level.inner_log_rate.exp().item() for level in continuum_levels(model).values()]


# --- reading ----------------------------------------------------------------------------------------------------


def lrs_of(name: str, lrs: dict[str, Sequence[float]]) -> tuple[float, float]:
    """The chosen learning rates of a training."""
    if name == UNTRAINED:
        return 0.0, 0.0
    of_rates, of_states = lrs[TRAININGS[name].like or name]
    return (of_rates if TRAININGS[name].rates else 0.0), of_states


def measured(model: Any, text: str, factor: float) -> Cell:
    """Nats on the second half of a novel, frozen and while reading, and on the stories, before and after."""
    ids = book(text)[:, : TOKENS + 1]
    with torch.no_grad():
        for level in continuum_levels(model).values():
            level.inner_log_rate.add_(math.log(factor))
    still, learned = (read_text(model, ids, learn=learn) for learn in (False, True))
    known = known_stories()
    stories = [stories_loss(model, known, state) for state in (None, learned.state)]
    return {"frozen": still.nats(0.5), "read": learned.nats(0.5), "stories": stories[0], "stories after": stories[1]}


def point(name: str, lrs: tuple[float, float], text: str, factor: float, seed: int, folder: str | None) -> Cell:
    """One reader, novel, factor of its rates and seed."""
    if name in TRAININGS:  # before the cell, whose time it is not
        training(name, lrs, seed, folder)

    def work() -> Cell:
        return measured(trained(name, lrs, seed, folder), text, factor)

    label = plain_name(CONTROL if name == OWN else name)
    return cell(RUNS, f"read-{text}-{label}-{lrs[0]:g}-{lrs[1]:g}-x{factor:g}-{seed}", work)


def choices(folder: str | None) -> Cell:
    """Learning rates, chosen on Moby-Dick with seed 0, and what they were chosen by."""
    lrs: dict[str, tuple[float, float]] = {}
    tried: dict[str, Cell] = {}

    def choose(name: str, candidates: Sequence[tuple[float, float]]) -> None:
        points = {pair: point(name, pair, VALIDATION, 1.0, 0, folder) for pair in candidates}
        tried.update({f"{name}, {a:g}, {b:g}": found for (a, b), found in points.items()})
        lrs[name] = min(points, key=lambda pair: worth(points[pair]))

    tried[UNTRAINED] = point(UNTRAINED, (0.0, 0.0), VALIDATION, 1.0, 0, folder)
    choose(RATES, [(lr, 0.0) for lr in RATE_LRS])
    choose(BOTH, [(lrs[RATES][0], lr) for lr in STATE_LRS])
    choose(OWN, [(0.0, lr) for lr in STATE_LRS])
    return {"lrs": lrs, "tried": tried}


def worth(found: Cell) -> float:
    """The less the better: nats on the novel, and on the stories WEIGHT times."""
    return found["read"] + WEIGHT * found["stories after"]


# --- report -----------------------------------------------------------------------------------------------------


def report(folder: str | None) -> Path:
    """Run what is missing, and write the result."""
    chosen = choices(folder)
    lrs = {name: lrs_of(name, chosen["lrs"]) for name in (UNTRAINED, *TRAININGS)}
    metrics: Cell = {"trainings": {}, "readers": {}}
    for name in TRAININGS:
        metrics["trainings"][name] = [training(name, lrs[name], seed, folder) for seed in SEEDS]
    for name in (UNTRAINED, *TRAININGS):
        metrics["readers"][name] = {
            f"{factor:g}": {text: [point(name, lrs[name], text, factor, s, folder) for s in SEEDS] for text in TESTS}
            for factor in (FACTORS if name in LINES else (1.0,))
        }
    metrics["differences"] = [difference(metrics["readers"], *pair) for pair in PAIRS]
    metrics["chosen by"] = chosen["tried"]
    config: Cell = {"trainings": {name: asdict(t) for name, t in TRAININGS.items()}, "lrs": chosen["lrs"]}
    config |= {"periods": PERIODS, "steps": STEPS, "tokens": [NOVEL, STORIES], "read": TOKENS, "texts": TESTS}
    config |= {"novels": NOVELS, "weight": WEIGHT}
    return write_result("write_training", config, list(SEEDS), rounded(metrics))


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("write_training", __doc__)
    add_data(parser)
    options = parser.parse_args(argv)
    run("write_training", options, lambda: report(options.data), page, draw)


if __name__ == "__main__":
    main()
