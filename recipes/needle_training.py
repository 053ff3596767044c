"""Small models that look for needles: books, a vocabulary, a curriculum of lengths, and the models of recipes.needles.

Everything here is the same for every model, but for the options of `hope`, which were found on validation rows:

- Haystacks: Emma and Sherlock Holmes for training, their last tenth for validation, Moby Dick for the test.
- Byte-pair encoding with few pieces, trained on the training text and on needles in it; every digit is a token.
- First rows of 23 tokens, the end of a needle and of its question (`ends`): without them Hope had not learned to copy
  after 600 steps (docs/log.md). Then whole rows of S-NIAH-1 and S-NIAH-2, of 96 tokens up to 1,024.
- Loss: cross-entropy of the answer, and half as much of a random quarter of all tokens (a language-modelling term).
- Muon for matrices and AdamW for the rest, at a constant rate that falls to zero at the end.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.data import BPETokenizer, ByteTokenizer
from nestling.data.bundled import bundled_text
from nestling.data.tokenizer import tokenizers_library
from nestling.evals.needles import NEEDLES, NeedleTask, new_value
from nestling.evals.suite import NOTHING, Examples
from nestling.memories.projections import ShortConvolution
from nestling.memories.self_modifying import SelfModifyingTitans
from nestling.models import LanguageModel, config_of, from_config, matched
from nestling.models.config import ModelConfig
from nestling.models.presets import count
from nestling.optim import MultiLevel, Muon
from nestling.optim.groups import hidden
from recipes.fitting import BETAS, WARMUP, minimise

VOCABULARY, SPOKEN = 640, 2_000  # pieces; rows that spell needles and questions
BOOKS, TEST_BOOK = ("emma", "sherlock_holmes"), "moby_dick"
LENGTH = 1_024
STAGES = (
    (0.15, 0),
    (0.25, 96),
    (0.35, 192),
    (0.45, 384),
    (1.0, LENGTH),
)  # until this share of the steps: tokens; 0 = ends
STEPS, TOKENS = 2_000, 2_048
LANGUAGE, PART = 0.5, 4  # weight of the language-modelling term; it is taken on every PART-th token, at random
TRAINED = ("s-niah-1", "s-niah-2")
MUON, MOMENTUM, DECAY, FALL = 4.0, 0.9, 0.01, 0.3  # Muon's rate over AdamW's; the share of steps in which rates fall
SHAPE: dict[str, Any] = {"dim": 48, "depth": 2, "heads": 2}


# --- text -------------------------------------------------------------------------------------------------------


@cache
def texts() -> dict[str, str]:
    """Training, validation and test text, in ASCII and with single spaces."""
    train = plain(" ".join(bundled_text(name) for name in BOOKS))
    cut = len(train) * 9 // 10
    return {"train": train[:cut], "validation": train[cut:], "test": plain(bundled_text(TEST_BOOK))}


def plain(text: str) -> str:
    return " ".join(text.encode("ascii", "ignore").decode().split())


@cache
def tokenizer() -> BPETokenizer:
    """Byte-pair encoding of ASCII text, trained on the training text and on needles in it; a digit is a piece."""
    library, spell = tokenizers_library(), ByteTokenizer()
    pre = library.pre_tokenizers
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    inner.decoder = library.decoders.ByteLevel()
    task, rng = NeedleTask(NEEDLES["multi-query"], spell, texts()["train"]), random.Random(0)
    rows = [spell.decode(task.row(LENGTH, rng)[0].tolist()) for _ in range(SPOKEN)]
    trainer = library.trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    inner.train_from_iterator([texts()["train"], *rows], trainer)
    return BPETokenizer(inner.to_str())


@cache
def task(name: str, split: str) -> NeedleTask:
    """A task over the text of a split."""
    return NeedleTask(NEEDLES[name], tokenizer(), texts()[split])


# --- models -----------------------------------------------------------------------------------------------------


ETA, GENERATORS, HALF_LIFE = -3.0, 1e-3, 1e6  # where the gates of `hope` start: eta is 2 sigmoid(ETA)
HEADS, HIDDEN = 1, 96  # its heads, and the width of its MLPs at which its parameters are those of the others


def config_for(name: str, shape: dict[str, Any] = SHAPE) -> ModelConfig:
    """The shape of a model. Its MLPs are one level, which nothing writes."""
    shape = shape | {"vocab_size": tokenizer().vocab_size, "periods": (math.inf,), "inner_lr": 0.0}
    whole = config_of("hope", **shape)
    if name == "hope-default":
        return whole
    if name == "hope":
        return replace(whole, heads=HEADS, hidden=HIDDEN * whole.dim // SHAPE["dim"])
    return matched(config_of(name, **shape), count(whole))


def make(name: str, shape: dict[str, Any] = SHAPE) -> LanguageModel:
    """A model by its name: `hope` with the options above, all others as the library has them."""
    return (hope if name == "hope" else from_config)(config_for(name, shape))


def hope(config: ModelConfig) -> LanguageModel:
    """Hope with options that learn this sooner: linear memories, one head, no SiLU in the convolution, other gates."""

    def mixer(config: ModelConfig) -> SelfModifyingTitans:
        layer = SelfModifyingTitans(
            config.dim,
            config.heads,
            chunk_size=config.chunk_size,
            memory="linear",
            half_life=HALF_LIFE,
            generator_rate=GENERATORS,
            convolution=ShortConvolution(config.dim, activation=False),
        )
        nn.init.constant_(layer.eta_bias, ETA)
        return layer

    return LanguageModel(config, mixer)


# --- training ---------------------------------------------------------------------------------------------------


def length_at(step: int, steps: int = STEPS) -> int:
    """Tokens of a row, in a training of `steps`."""
    return next(length for until, length in STAGES if step < until * steps or until == 1)


def batch(step: int, seed: int, steps: int = STEPS) -> Examples:
    """TOKENS tokens in rows of one length, the TRAINED tasks in equal parts; `ends` in the first stage."""
    length, own = length_at(step, steps), len(TRAINED) * (seed * 1_000_003 + step)
    if not length:
        return ends(own)
    rows = TOKENS // length
    parts = [
        task(name, "train").examples((rows + i) // len(TRAINED), (length, length), own + i)
        for i, name in enumerate(TRAINED)
    ]
    return Examples(torch.cat([p.tokens for p in parts]), torch.cat([p.targets for p in parts]))


def ends(seed: int) -> Examples:
    """TOKENS tokens in rows that are the end of a needle and, at once, that of its question with the answer."""
    spell, rng = tokenizer(), random.Random(seed)
    rows: list[list[int]] = []
    while sum(map(len, rows)) < TOKENS:
        value = new_value(NEEDLES["s-niah-1"], rng)
        rows.append([*spell.encode(f" is: {value}. "), *spell.encode(" provided text is"), *spell.encode(f" {value}")])
    tokens = torch.tensor(rows)
    targets = torch.full_like(tokens, NOTHING)
    asked = len(spell.encode(f" {value}"))
    targets[:, -asked - 1 : -1] = tokens[:, -asked:]
    return Examples(tokens, targets)


def loss_on(model: LanguageModel, rows: Examples, generator: torch.Generator) -> Tensor:
    """Nats per asked token, and LANGUAGE times nats per token of a random part of the text."""
    hidden, _ = model.body(rows.tokens, [None] * model.contexts)
    flat, asked = hidden[:, :-1].flatten(0, 1), rows.targets[:, :-1].flatten()
    after = rows.tokens[:, 1:].flatten()
    where = torch.cat([(asked != NOTHING).nonzero()[:, 0], torch.randperm(len(after), generator=generator)])
    answers = int((asked != NOTHING).sum())
    where = where[: answers + len(after) // PART]
    nats = F.cross_entropy(model.to_logits(flat[where]), after[where], reduction="none")
    return nats[:answers].mean() + LANGUAGE * nats[answers:].mean()


def optimizer_of(model: nn.Module, lr: float) -> MultiLevel:
    """Muon for hidden matrices, AdamW for the rest."""
    inside = hidden(model)
    matrices = [p for p in model.parameters() if id(p) in inside]
    rest = [p for p in model.parameters() if id(p) not in inside]
    muon = Muon(matrices, lr=MUON * lr, momentum=MOMENTUM, weight_decay=DECAY)
    return MultiLevel(
        {"matrices": (muon, 1), "rest": (torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=DECAY), 1)}
    )


def pace(step: int, steps: int) -> float:
    """Share of the rates: up, constant, and in a line down to zero."""
    return min(1, (step + 1) / WARMUP, (1 - step / steps) / FALL)


def train(model: LanguageModel, lr: float, seed: int, *, steps: int = STEPS, stop: int | None = None) -> float:
    """Fit fresh rows of every step, the first `stop` of `steps`; the mean loss of the last ones."""
    generator = torch.Generator().manual_seed(seed)
    return minimise(
        model,
        lambda step: loss_on(model, batch(step, seed, steps), generator),
        stop or steps,
        optimizer_of(model, lr),
        lambda step, _: pace(step, steps),
    )


def config() -> dict[str, Any]:
    """What identifies a training."""
    return SHAPE | {
        "hope": {"heads": HEADS, "hidden": HIDDEN, "gates": [ETA, GENERATORS, HALF_LIFE]},
        "books": [*BOOKS, TEST_BOOK],
        "vocabulary": VOCABULARY,
        "stages": STAGES,
        "steps": STEPS,
        "tokens of a step": TOKENS,
        "language": [LANGUAGE, PART],
        "muon": [MUON, MOMENTUM, DECAY],
        "fall": FALL,
        "versions": {name: NEEDLES[name].version for name in TRAINED},
    }
