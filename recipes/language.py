"""What the recipes about language share: books and WikiText-2, equal streams for every model, bits per byte.

Trained on the first nine tenths of three novels and of the validation file of WikiText-2, cut into pieces by one
byte-pair encoding that was learned on just that text; a model reads a part of it once, in rows that go on from step to
step. A memory of tokens starts anew at every batch; what Hope's levels have written lives for a stream of 32 batches.
Validation is the last tenth of each (`held out`, windows of the training length) and two novels that were never read
(`novels`, windows as long as a stream). The first half of WikiText-2's test file (`test`) is read by the reports
alone, from saved weights. All losses are bits per byte of text, so that the pieces do not matter.

Hope's levels write without the metric of old keys (`inner_kappa=0`, as in the presets of the paper's sizes): it guards
what was learned in training, and makes the default writes nearly invisible here (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.data import (
    BPETokenizer,
    Tokenizer,
    Tokens,
    TokenStream,
    held_out_windows,
    load_documents,
    split_documents,
    tokenize,
)
from nestling.evals.perplexity import perplexity
from nestling.models import LanguageModel, config_of, from_config, matched
from nestling.models.config import ModelConfig
from recipes.cells import Cell, cell, rounded
from recipes.fitting import fit
from recipes.learning_tasks import STREAM, losses

Folder = str | Path | None
TRAINED = (
    "gutenberg/pride_and_prejudice",
    "gutenberg/huckleberry_finn",
    "gutenberg/grimms_fairy_tales",
    "wikitext2_valid",
)
NOVELS = ("gutenberg/emma", "gutenberg/sherlock_holmes")
TEST = ("wikitext2_test_a",)
PIECES = 1024
LENGTH, ROWS, STEPS = 256, 4, 200
RATES = (8e-3, 1.6e-2, 3.2e-2)
LONG, SHORT_WINDOWS, LONG_WINDOWS = STREAM * LENGTH, 128, 4
SIZES = {"tiny": (32, 2, 2), "small": (64, 2, 2), "middle": (96, 2, 2), "large": (128, 2, 2)}  # width, blocks, heads
SWEPT = "small"
LEVELS: dict[str, Any] = {"periods": (256.0, 1_024.0), "inner_kappa": 0.0}  # 31 and 7 writes per stream
RUNS = Path("runs/language_modelling")


# --- text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and what is held out of it."""

    tokenizer: Tokenizer
    training: Tokens
    held_out: Tokens
    bytes_per_token: float  # of what is held out


def documents(names: Iterable[str], folder: Folder) -> list[str]:
    """Data files by their names."""
    return [text for name in names for text in load_documents(f"lm/{name}.txt.xz", folder)]


@lru_cache(maxsize=1)
def corpus(folder: Folder) -> Corpus:
    """The training text, its last tenths, and the pieces; kept, because all cells read them."""
    training, held_out = split_documents(documents(TRAINED, folder), 0.1)
    tokenizer = BPETokenizer.train(training, PIECES)
    held = tokenize(held_out, tokenizer)
    return Corpus(tokenizer, tokenize(training, tokenizer), held, bytes_per_token(held_out, held))


def bytes_per_token(texts: Iterable[str], tokens: Tokens) -> float:
    """Bytes of UTF-8 that a token stands for."""
    return sum(len(text.encode()) for text in texts) / len(tokens)


@lru_cache(maxsize=2)
def long_windows(names: tuple[str, ...], folder: Folder) -> tuple[Tensor, float]:
    """Windows of `LONG` tokens (n, LONG + 1) over texts that were not trained on, and their bytes per token."""
    texts = documents(names, folder)
    tokens = tokenize(texts, corpus(folder).tokenizer)
    return held_out_windows(tokens, length=LONG, count=LONG_WINDOWS), bytes_per_token(texts, tokens)


# --- models -----------------------------------------------------------------------------------------------------


def config_for(name: str, size: str, **overrides: Any) -> ModelConfig:
    """A model of a size, with the parameters of the Transformer of that size."""
    dim, depth, heads = SIZES[size]
    shape: dict[str, Any] = {"vocab_size": PIECES, "dim": dim, "depth": depth, "heads": heads}
    config = config_of(name, **(shape | (LEVELS if name == "hope" else {}) | overrides))
    return config if name == "transformer" else matched(config, "transformer")


def readers(model: LanguageModel) -> dict[str, tuple[LanguageModel, bool]]:
    """The ways to read beyond the training length: model, and whether its levels learn."""
    if model.config.name == "transformer":
        windowed = from_config(replace(model.config, window=LENGTH))
        windowed.load_state_dict(model.state_dict())
        return {"full": (model, False), "window": (windowed, False)}
    learns = any(period < float("inf") for period in model.config.periods)
    return {"frozen": (model, False)} | ({"learning": (model, True)} if learns else {})


# --- cells ------------------------------------------------------------------------------------------------------


def train(model: LanguageModel, tokens: Tokens, lr: float, seed: int) -> float:
    """Fit `STEPS` batches of a stream; the mean loss of the last ones, in nats per token."""
    batches = losses(model, TokenStream(tokens, rows=ROWS, length=LENGTH, seed=seed))
    return fit(model, lambda step: next(batches), steps=STEPS, lr=lr)


def trained(label: str, config: ModelConfig, lr: float, seed: int, folder: Folder) -> Cell:
    """Train one model, save its weights, and measure it on validation text."""
    name = f"{label}-{lr:g}-{seed}"

    def work() -> Cell:
        texts = corpus(folder)
        torch.manual_seed(seed)
        model = from_config(config)
        made: Cell = {"parameters": model.num_parameters(), "loss": train(model, texts.training, lr, seed)}
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), RUNS / f"{name}.pt")
        windows = held_out_windows(texts.held_out, length=LENGTH, count=SHORT_WINDOWS)
        short = perplexity(model, windows, bytes_per_token=texts.bytes_per_token).total.bits_per_byte
        return made | {"held out": short, "novels": long_losses(model, *long_windows(NOVELS, folder))}

    return cell(RUNS, name, lambda: rounded(work()))


def tested(label: str, config: ModelConfig, lr: float, seed: int, folder: Folder) -> Cell:
    """Read the test text with the saved weights of a cell."""
    name = f"{label}-{lr:g}-{seed}"

    def work() -> Cell:
        model = from_config(config)
        model.load_state_dict(torch.load(RUNS / f"{name}.pt", weights_only=True))
        return long_losses(model, *long_windows(TEST, folder))

    return cell(RUNS, f"{name}-test", lambda: rounded(work()))


def measured(label: str, config: ModelConfig, lr: float, seed: int, folder: Folder) -> Cell:
    """`trained` and `tested` together."""
    found, test = trained(label, config, lr, seed, folder), tested(label, config, lr, seed, folder)
    seconds = found["cpu_seconds"] + test.pop("cpu_seconds")
    return found | {"test": test, "cpu_seconds": round(seconds, 1)}


def sweep(name: str, folder: Folder) -> dict[str, Cell]:
    """Seed 0 at the size `SWEPT` by rate: the loss on the novels beyond the training length, and what it took."""
    made = {f"{lr:g}": trained(f"{name}-{SWEPT}", config_for(name, SWEPT), lr, 0, folder) for lr in RATES}
    return {
        lr: {"novels": bits([found], "novels", "beyond", found["novels"])[0]} | {"cpu_seconds": found["cpu_seconds"]}
        for lr, found in made.items()
    }


def chosen_rate(swept: dict[str, Cell]) -> float:
    """The rate with the least loss on the novels; among equals, the first."""
    return min(RATES, key=lambda lr: swept[f"{lr:g}"]["novels"])


def long_losses(model: LanguageModel, windows: Tensor, width: float) -> Cell:
    """Bits per byte by way of reading: beyond the training length, in the second half, and by position."""
    made: Cell = {}
    for way, (reader, learn) in readers(model).items():
        found = perplexity(reader, windows, learn=learn, buckets=LONG // LENGTH, bytes_per_token=width).by_position
        curve = [part.bits_per_byte for part in found]
        made[way] = {"beyond": mean(curve[1:]), "late": mean(curve[len(curve) // 2 :]), "by position": curve}
    return made


def bits(cells: Iterable[Cell], text: str, part: str, ways: Iterable[str]) -> list[float]:
    """Bits per byte of every cell on `text`, read in the best of some ways."""
    return [min(found[text][way][part] for way in ways) for found in cells]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
