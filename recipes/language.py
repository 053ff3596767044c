"""What the recipes about language share: books and WikiText-2, equal streams for every model, bits per byte.

Trained on the first nine tenths of three novels and of the validation file of WikiText-2, cut into pieces by one
byte-pair encoding that was learned on just that text; a model reads it once, in rows that go on from step to step.
Validation is the last tenth of each (`held out`, windows of the training length) and two novels that were never read
(`novels`, windows of eight times that length). The first half of WikiText-2's test file (`test`) is read by the
reports alone, from saved weights. All losses are bits per byte of text, so that the pieces do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

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
from nestling.train.calibration import calibrate
from recipes.cells import Cell, cell, rounded
from recipes.fitting import fit
from recipes.learning_tasks import losses

Folder = str | Path | None
TRAINED = ("gutenberg/pride_and_prejudice", "gutenberg/huckleberry_finn", "gutenberg/grimms_fairy_tales")
TRAINED += ("wikitext2_valid",)
NOVELS = ("gutenberg/emma", "gutenberg/sherlock_holmes")
TEST = ("wikitext2_test_a",)
PIECES = 1024
LENGTH, ROWS, STEPS, CALIBRATED = 256, 4, 200, 100
RATES = (4e-3, 8e-3, 1.6e-2)
LONG, SHORT_WINDOWS, LONG_WINDOWS, BUCKETS = 8 * LENGTH, 128, 16, 16
SIZES = {"small": (64, 2, 2), "middle": (96, 2, 2), "large": (128, 3, 2)}  # width, blocks, heads
PERIODS = (256, 1_024, float("inf"))  # of a Hope: 31 and 7 writes per stream of 32 batches
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


def config_for(name: str, size: str, **overrides: object) -> ModelConfig:
    """A model of a size, with the parameters of the Transformer of that size."""
    dim, depth, heads = SIZES[size]
    shape: dict[str, object] = {"vocab_size": PIECES, "dim": dim, "depth": depth, "heads": heads}
    periods = {"periods": PERIODS} if name == "hope" else {}
    config = config_of(name, **(shape | periods | overrides))
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
    stream = TokenStream(tokens, rows=ROWS, length=LENGTH, seed=seed)
    batches, device = losses(model, stream), torch.device("cpu")

    def loss_at(step: int) -> Tensor:
        if step and step % CALIBRATED == 0:
            calibrate(model, stream, device=device)
        return next(batches)

    loss = fit(model, loss_at, steps=STEPS, lr=lr)
    calibrate(model, stream, device=device)
    return loss


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
    """The cells of seed 0 at the smallest size by rate; what they say about text that is not held out is left out."""
    size = next(iter(SIZES))
    made = {f"{lr:g}": trained(f"{name}-{size}", config_for(name, size), lr, 0, folder) for lr in RATES}
    return {lr: {key: found[key] for key in ("held out", "cpu_seconds")} for lr, found in made.items()}


def chosen_rate(swept: dict[str, Cell]) -> float:
    """The rate with the least loss on what is held out; among equals, the first."""
    return min(RATES, key=lambda lr: swept[f"{lr:g}"]["held out"])


def long_losses(model: LanguageModel, windows: Tensor, width: float) -> Cell:
    """Bits per byte by way of reading: inside the training length, beyond it, and by position."""
    inside, made = BUCKETS * LENGTH // LONG, {}
    for way, (reader, learn) in readers(model).items():
        found = perplexity(reader, windows, learn=learn, buckets=BUCKETS, bytes_per_token=width).by_position
        bits = [part.bits_per_byte for part in found]
        made[way] = {"inside": mean(bits[:inside]), "beyond": mean(bits[inside:]), "by position": bits}
    return made


def bits(cells: Iterable[Cell], text: str, part: str, ways: Iterable[str]) -> list[float]:
    """Bits per byte of every cell on `text`, read in the best of some ways."""
    return [min(found[text][way][part] for way in ways) for found in cells]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
