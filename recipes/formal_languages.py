"""Formal languages: trained on strings of at most 40 symbols, read on longer ones, by length and by chunk size.

    python -m recipes.formal_languages
    python -m recipes.formal_languages --models hope --languages parity "a^n b^n" --seeds 1
    python -m recipes.formal_languages --table                # the committed result as a table
    python -m recipes.formal_languages --figure               # and as docs/figures/formal_languages.png

A language is solved at a chunk size if every position of every test string up to four times the training length is
right, for every seed. All models are trained alike: half of a batch are strings of any length, half are long ones, and
targets are smoothed, which keeps asking for a larger margin when all training strings are right already. Rates: the
same three for every model, one seed, two languages, by how many other strings of up to twice the training length are
wholly right. The settings of `hope` were chosen on strings of other seeds than the test's; two further seeds, which
chose nothing, confirm them. Every model reads the six languages of the paper; `hope` and `lstm` also count by three and
five, reckon and permute.

`hope` is made of options of the library: matrices as memories, a convolution of one token (so that a symbol is always
the same key), one head, no decay, generators that hardly move, one block whose writes reflect (erase, eta near 2) and
one whose writes only add, all of them equally much (eta saturated). Three things make its counts exact beyond the
training length (docs/log.md): all symbols begin with nearly one value in the adding block (`begin_with_one_value`), so
that they cancel by their keys and what is read passes through zero; and its loss has two terms that the others have
not, priors on what a counter is. A little of the root of 1 + energy, the energy being the squares of what the adding
memory holds at the end of a string: members leave nothing behind. And a little of what queries find of symbols that
have not come yet (`found_ahead`): a query sees only what can have been written. `hope-plain` is the same model without
these two terms, `hope-default` is
`nestling.models.build("hope")` of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.evals.formal_languages import LANGUAGES, PAPER, Language
from nestling.evals.suite import NOTHING, Examples, score
from nestling.memories.projections import ShortConvolution, unit_norm
from nestling.memories.self_modifying import SelfModifyingTitans
from nestling.models import NAMES, LanguageModel, Output, State, config_of, from_config, matched
from nestling.models.config import ModelConfig
from nestling.ops.self_modifying import Rule
from recipes.cells import Cell, cell, rounded, write_result
from recipes.command import parser_of, run
from recipes.fitting import fit
from recipes.formal_languages_page import draw, page

LENGTH, STEPS, BATCH, SMOOTHING = 40, 400, 32, 0.1
ENERGY, AHEAD = 1e-2, 1e-1
ETA_BIAS = {"decayed": 2.0, "none": 20.0}  # eta 1.76: reflections from the start; and 2 for good: every write the same
VALUE = 5.0  # so large that keys learn before values turn
RATES = (1e-2, 5e-3, 2e-2)
SWEPT = ("parity", "shuffle-2")
BINS = ((1, LENGTH), (LENGTH + 1, 4 * LENGTH), (4 * LENGTH + 1, 256), (1001, 1024))
STRINGS, TEST_SEED, VALIDATION_SEED = 64, 40_000, 20_000
CONFIRMED, CONFIRMING_SEEDS = ("a^n b^n c^n", "shuffle-2"), (3, 4)
FURTHER = tuple(name for name in LANGUAGES if name not in PAPER)
FURTHER_MODELS = ("hope", "lstm")
CHUNK, CHUNKS, OTHERS_CHUNKS = 64, (1, 16, 32, 64), (16, 64)
SHAPE: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 1}
RUNS = Path("runs/formal_languages")


# --- models -----------------------------------------------------------------------------------------------------


def hope(config: ModelConfig) -> LanguageModel:
    """Hope for state tracking, see above."""
    erases: Iterator[Literal["decayed", "none"]] = cycle(("decayed", "none"))

    def mixer(config: ModelConfig) -> nn.Module:
        erase = next(erases)
        layer = SelfModifyingTitans(
            config.dim,
            config.heads,
            chunk_size=config.chunk_size,
            memory="linear",
            rule=Rule(erase=erase),
            half_life=None,
            generator_rate=1e-4,
            convolution=ShortConvolution(config.dim, width=1, activation=False),
        )
        nn.init.ones_(layer.conv.weight)
        nn.init.constant_(layer.eta_bias, ETA_BIAS[erase])
        return layer

    model = LanguageModel(config, mixer)
    begin_with_one_value(model)
    return model


@torch.no_grad()
def begin_with_one_value(model: LanguageModel) -> None:
    """Let all symbols begin with nearly the same value in the adding memories, and with keys far apart.

    The embeddings get a part that all of them share; the memory of values sees little else, that of keys nothing of it.
    """
    shared = torch.randn(model.config.dim)
    model.embedding.weight += shared
    for block in model.blocks[1::2]:
        layer = block.mixer
        assert isinstance(layer, SelfModifyingTitans)
        seen = F.normalize(layer.project_z.weight @ shared, dim=0)  # (K,)
        keys, values = layer.initial[0][0, :2]  # (K, V) each, of the only head
        keys -= torch.outer(seen, seen @ keys)
        values *= 0.1 * VALUE
        values += VALUE * torch.outer(seen, F.normalize(torch.randn(values.shape[1]), dim=0))


class LSTM(nn.Module):
    """Embedding, an LSTM of torch, head."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        return Output(self.head(self.lstm(self.embedding(tokens))[0]), state)  # type: ignore[arg-type]


def config_for(name: str, vocab_size: int, chunk_size: int) -> ModelConfig:
    """The shape of a model. CMS levels are frozen: there is no next token here that they could learn from."""
    shape = SHAPE | {"vocab_size": vocab_size, "periods": (math.inf,), "inner_lr": 0.0, "chunk_size": chunk_size}
    if name in ("hope", "hope-plain"):
        return config_of("hope", **shape)
    return matched(config_of("hope" if name == "hope-default" else name, **shape), parameters(vocab_size))


def parameters(vocab_size: int) -> int:
    """Parameters of `hope`, which the others match within 2 %."""
    return hope(config_for("hope", vocab_size, CHUNK)).num_parameters()


def make(name: str, vocab_size: int, chunk_size: int = CHUNK) -> nn.Module:
    """A model by its name in the table."""
    if name == "lstm":
        goal = parameters(vocab_size)
        width = min(range(4, 128), key=lambda w: abs(8 * w * w + 8 * w + (2 * w + 1) * vocab_size - goal))
        return LSTM(vocab_size, width)
    make_one: Callable[[ModelConfig], LanguageModel] = hope if name in ("hope", "hope-plain") else from_config
    return make_one(config_for(name, vocab_size, chunk_size))


OWN = ("hope", "hope-plain", "hope-default", "lstm")
MODELS = (*OWN, *(name for name in NAMES if name not in ("hope", "hope-attention")))


# --- cells ------------------------------------------------------------------------------------------------------


def train(model: nn.Module, language: Language, lr: float, seed: int, weights: tuple[float, ...] = ()) -> float:
    """Fit fresh strings of every step; the mean loss of the last steps."""
    return fit(
        model,
        lambda step: loss_on(model, batch(language, seed * 1_000_003 + step), SMOOTHING, *weights),
        steps=STEPS,
        lr=lr,
    )


def batch(language: Language, seed: int) -> Examples:
    """Half of the strings of any length up to `LENGTH`, half within 8 of it."""
    parts = [language.examples(BATCH // 2, (low, LENGTH), 2 * seed + i) for i, low in enumerate((1, LENGTH - 8))]
    tokens, targets = (
        torch.cat([F.pad(t, (0, LENGTH - t.shape[1]), value=value) for t in made])
        for made, value in (([p.tokens for p in parts], 0), ([p.targets for p in parts], NOTHING))
    )
    return Examples(tokens, targets)


def loss_on(
    model: nn.Module, strings: Examples, smoothing: float = 0.0, energy: float = 0.0, ahead: float = 0.0
) -> Tensor:
    """Cross-entropy in nats per asked position, `energy` times the root of 1 + the adding memories' energy, and `ahead`
    times what queries find of symbols that have not come yet."""
    term = torch.zeros(())
    if energy or ahead:
        assert isinstance(model, LanguageModel)
        logits, held, found = read_adding(model, strings)
        term = energy * torch.sqrt(1 + held) + ahead * found
    else:
        logits = model(strings.tokens).logits
    flat = logits.flatten(0, 1), strings.targets.flatten()
    return F.cross_entropy(*flat, ignore_index=NOTHING, label_smoothing=smoothing) + term


def read_adding(model: LanguageModel, strings: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """Logits; energy of the adding memory at the ends of the strings; what it finds of symbols still to come."""
    layer, mixed = model.blocks[1].mixer, []
    assert isinstance(layer, SelfModifyingTitans)
    hook = layer.conv.register_forward_hook(lambda _module, _inputs, made: mixed.append(made[0]))
    hidden, states = model.body(strings.tokens, [None] * len(model.blocks), ends(strings))
    hook.remove()
    held = states[1].running[0][:, :, -1]  # (B, H, K, V) of the memory that is read
    return model.head(hidden), held.square().sum((1, 2, 3)).mean(), found_ahead(layer, mixed[0], strings)


def found_ahead(layer: SelfModifyingTitans, mixed: Tensor, strings: Examples) -> Tensor:
    """Squares of query times key, of the keys of symbols that no place up to the query's has had; mean over all pairs
    of places. mixed (B, T, D): what leaves the convolution. A query that sees none of them reads exactly what the
    symbols before it leave."""
    assert layer.project_q is not None
    keys = F.normalize(unit_norm(layer.project_z(mixed)) @ layer.initial[0][0, 0], dim=-1)  # (B, S, K), of the one head
    found = (unit_norm(layer.project_q(mixed)) @ keys.mT).square()  # (B, T, S)
    real = torch.arange(found.shape[1]) < ends(strings)[:, None]
    had = (F.one_hot(strings.tokens) * real[..., None]).cumsum(1) > 0  # (B, T, symbols)
    new = ~had.gather(2, strings.tokens[:, None, :].expand_as(found))
    pairs = real[:, :, None] & real[:, None, :]
    return (found * (new & pairs)).sum() / pairs.sum()


def ends(strings: Examples) -> Tensor:
    """(B,): lengths of the strings."""
    places = torch.arange(1, strings.targets.shape[1] + 1)
    return ((strings.targets != NOTHING) * places).amax(1)


def run_cell(name: str, language: str, lr: float, seed: int) -> Cell:
    """Train one model and read it at every chunk size."""

    def work() -> Cell:
        torch.manual_seed(seed)
        task = LANGUAGES[language]
        model = make(name, task.vocab_size)
        loss = train(model, task, lr, seed, (ENERGY, AHEAD) if name == "hope" else ())
        made: Cell = {"parameters": sum(p.numel() for p in model.parameters()), "loss": loss}
        found = score(model, task, STRINGS, (LENGTH + 1, 2 * LENGTH), seed=VALIDATION_SEED)
        made |= {"validation": [found.exact_share, found.accuracy], "read": read(name, model, task)}
        if name == "hope":
            found = score(model, task, STRINGS, (2 * LENGTH + 1, 4 * LENGTH), seed=VALIDATION_SEED)
            made["validation, four times"] = [found.exact_share, found.accuracy]
        return made

    plain = "".join(c if c.isalnum() else "_" for c in language)
    return cell(RUNS, f"{name}-{plain}-{lr:g}-{seed}", work)


def read(name: str, model: nn.Module, language: Language) -> Cell:
    """Shares of wholly right strings and of right positions, by chunk size and by bin of lengths."""
    made: Cell = {}
    chunked = isinstance(model, LanguageModel) and name != "transformer"
    chunks = CHUNKS if name == "hope" else OTHERS_CHUNKS
    for chunk in chunks if chunked else (CHUNK,):
        reader = make(name, language.vocab_size, chunk)
        reader.load_state_dict(model.state_dict())
        scores = [score(reader, language, STRINGS, lengths, seed=TEST_SEED) for lengths in BINS]
        made[str(chunk) if chunked else "any"] = [[s.exact_share, s.accuracy] for s in scores]
    return made


# --- table ------------------------------------------------------------------------------------------------------


def sweep(name: str) -> dict[str, list[float]]:
    """Validation of one seed by rate: wholly right strings and right positions, means over the swept languages."""
    made = {}
    for lr in RATES:
        found = [run_cell(name, language, lr, 0)["validation"] for language in SWEPT]
        made[f"{lr:g}"] = [sum(part) / len(SWEPT) for part in zip(*found, strict=True)]
    return made


def chosen_rate(swept: dict[str, list[float]]) -> float:
    """The rate with the most wholly right strings; among equals, with the most right positions, then the first."""
    return max(RATES, key=lambda lr: swept[f"{lr:g}"])


def solved(cells: Sequence[Cell], up_to: int) -> list[str]:
    """Chunk sizes at which every string up to `up_to` symbols is right for all seeds."""
    bins = [i for i, (_, longest) in enumerate(BINS) if longest <= up_to]
    return [chunk for chunk in cells[0]["read"] if all(c["read"][chunk][i][0] == 1 for c in cells for i in bins)]


def report(names: Sequence[str], languages: Sequence[str], seeds: int) -> Path:
    """Run what is missing, and write the result."""
    metrics: Cell = {"bins": BINS, "sweep": {}, "chosen rate": {}, "cells": {}, "solved at four times the length": {}}
    for name in names:
        swept = metrics["sweep"][name] = sweep(name)
        lr = metrics["chosen rate"][name] = chosen_rate(swept)
        asked = [one for one in languages if one in PAPER or name in FURTHER_MODELS]
        cells = {language: [run_cell(name, language, lr, seed) for seed in range(seeds)] for language in asked}
        metrics["cells"][name] = cells
        metrics["solved at four times the length"][name] = {k: solved(v, 4 * LENGTH) for k, v in cells.items()}
    if "hope" in names:
        lr = metrics["chosen rate"]["hope"]
        metrics["confirmation"] = {k: [run_cell("hope", k, lr, seed) for seed in CONFIRMING_SEEDS] for k in CONFIRMED}
    return write_result("formal_languages", settings(), list(range(seeds)), rounded(metrics))


def settings() -> Cell:
    """What identifies the runs."""
    versions = {name: language.version for name, language in LANGUAGES.items()}
    trained = {"length": LENGTH, "steps": STEPS, "batch": BATCH, "smoothing": SMOOTHING, "rates": RATES}
    read_as = {"chunk size in training": CHUNK, "strings": STRINGS, "test seed": TEST_SEED, "versions": versions}
    rules = {
        "rules of hope": [asdict(Rule()), asdict(Rule(erase="none"))],
        "energy": ENERGY,
        "ahead": AHEAD,
        "value": VALUE,
    }
    return trained | read_as | SHAPE | rules | {"confirming seeds": CONFIRMING_SEEDS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("formal_languages", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--languages", nargs="+", choices=tuple(LANGUAGES), default=list(LANGUAGES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("formal_languages", options, lambda: report(options.models, options.languages, options.seeds), page, draw)


if __name__ == "__main__":
    main()
