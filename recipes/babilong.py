"""BABILong in small: bAbI's qa1 in books, trained at lengths 0 to 4K tokens, asked at 0 to 64K and up to a million.

    python -m recipes.babilong --data DIR               # DIR/longctx/babi.tar.xz, DIR/lm/gutenberg; or $NESTLING_DATA
    python -m recipes.babilong --data DIR --models hope gated-delta-net --seeds 1
    python -m recipes.babilong --table                  # the committed result as tables
    python -m recipes.babilong --figure                 # and as docs/figures/babilong.png

The curriculum of the BABILong paper, from scratch: stories alone, then in 256 to 1,024 tokens of a book, then in 1,024
to 4,096; a lesson asks all questions of a story, only answers are learned. Training stories are those of the 10k set
but the last 200, which validate; tests ask the test set. Each of the three has a book of its own. Rates: the same three
for every model, one seed, the first stage, by bits per answer on validation stories.

`hope` is made of options of the library: matrices as memories, a convolution without SiLU, a half-life of a million
tokens, generators that hardly move; its CMS level is frozen (docs/log.md has what was tried). The stream of a million
tokens (recipes/babilong_stream.py) is read by the seed that is best on validation questions at 1K.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.data import BPETokenizer, load_documents
from nestling.data.text import locate
from nestling.evals import BABILongTask, babilong_score, interval, paired, read_stories, verdict
from nestling.evals.suite import NOTHING, Examples
from nestling.memories.projections import ShortConvolution
from nestling.memories.self_modifying import SelfModifyingTitans
from nestling.models import LanguageModel, config_of, from_config, matched
from nestling.models.config import ModelConfig
from nestling.models.presets import count
from recipes.babilong_figures import draw, page
from recipes.cells import Cell, cell, rounded, write_result
from recipes.command import add_data, parser_of, run
from recipes.fitting import fit

QUESTIONS, VALIDATION_STORIES, VOCAB = "qa1", 200, 512
BOOKS = {"train": "pride_and_prejudice", "validation": "emma", "test": "war_and_peace"}
STAGES = (((0, 0), 180, 24), ((256, 1024), 50, 4), ((1024, 4096), 60, 1))  # lengths in tokens, steps, stories a step
RATES = (5e-3, 2.5e-3, 1e-2)
TESTS = {0: 200, 1024: 64, 4096: 16, 16_384: 8, 65_536: 4}  # tokens: questions, for every seed
ATTENTION_UP_TO = 16_384  # every key is compared with: a 64K text would take a minute
STREAM, STREAMED = 2**20, ("hope", "gated-delta-net")
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "dim": 64, "depth": 2, "heads": 2}
MODELS = ("hope", "gated-delta-net", "titans-lmm", "transformer")
TEST_SEED, VALIDATION_SEED = 10_000, 20_000
RUNS = Path("runs/babilong")


# --- models and data --------------------------------------------------------------------------------------------


def hope_mixer(config: ModelConfig) -> nn.Module:
    """The memory of `hope`, see above."""
    return SelfModifyingTitans(
        config.dim,
        config.heads,
        chunk_size=config.chunk_size,
        memory="linear",
        half_life=1e6,
        generator_rate=1e-3,
        convolution=ShortConvolution(config.dim, activation=False),
    )


def config_for(name: str) -> ModelConfig:
    """The shape of a model: parameters within 2 % of the transformer's. CMS levels are frozen: nothing is predicted."""
    config = config_of(name, **SHAPE, periods=(math.inf,))
    if name != "hope":
        return matched(config, "transformer")
    features = config.depth * config.dim**2 // config.heads  # which memories that are matrices do without
    return matched(config, count(config_of("transformer", **SHAPE)) + features)


def make(name: str) -> LanguageModel:
    """A model by its name in the table."""
    return LanguageModel(config_for(name), hope_mixer) if name == "hope" else from_config(config_for(name))


@cache
def tokenizer(data: str | None) -> BPETokenizer:
    """Pieces of the training book and of some stories; every word of a story is one."""
    stories = [s for name in ("qa1", "qa2") for s in read_stories(babi(data), name, "train")[:500]]
    lines = [f" {line}" for s in stories for line in (*s.facts, *(f"{q.text} {q.answer}" for q in s.questions))]
    return BPETokenizer.train([" ".join(book("train", data).split())[:300_000], *lines], VOCAB)


@cache
def task(part: str, data: str | None) -> BABILongTask:
    """Stories and book of a part: train, validation, test."""
    stories = read_stories(babi(data), QUESTIONS, "test" if part == "test" else "train")
    own = {"train": slice(None, -VALIDATION_STORIES), "validation": slice(-VALIDATION_STORIES, None)}
    return BABILongTask(QUESTIONS, stories[own.get(part, slice(None))], tokenizer(data), book(part, data))


def babi(data: str | None) -> Path:
    return locate("longctx/babi.tar.xz", data)


def book(part: str, data: str | None) -> str:
    return "".join(load_documents(f"lm/gutenberg/{BOOKS[part]}.txt.xz", data))


# --- cells ------------------------------------------------------------------------------------------------------


def answer_loss(model: LanguageModel, lessons: Examples) -> Tensor:
    """Cross-entropy in nats per answer token."""
    hidden, _ = model.body(lessons.tokens, [None] * len(model.blocks))
    asked = lessons.targets != NOTHING
    return F.cross_entropy(model.head(hidden[asked]), lessons.targets[asked])


def train(name: str, lr: float, seed: int, data: str | None, stages: Sequence[Any] = STAGES) -> LanguageModel:
    """Fit fresh lessons of every step, stage after stage under one schedule."""
    torch.manual_seed(seed)
    model, lessons = make(name), task("train", data)
    plan = [(lengths, count) for lengths, steps, count in stages for _ in range(steps)]

    def loss_at(step: int) -> Tensor:
        lengths, count = plan[step]
        return answer_loss(model, lessons.lessons(count, lengths, seed * 1_000_003 + step))

    fit(model, loss_at, steps=len(plan), lr=lr)
    return model


def rate_cell(name: str, lr: float, data: str | None) -> Cell:
    """Bits and accuracy on validation stories after the first stage."""

    def work() -> Cell:
        model = train(name, lr, 0, data, STAGES[:1])
        found = babilong_score(model, task("validation", data), 200, (0, 0), seed=VALIDATION_SEED)
        return {"bits": found.bits, "accuracy": found.accuracy}

    return cell(RUNS, f"rate-{name}-{lr:g}", work)


def train_cell(name: str, lr: float, seed: int, data: str | None) -> Cell:
    """One model through the curriculum, its weights saved."""

    def work() -> Cell:
        model = train(name, lr, seed, data)
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights(name, lr, seed))
        found = babilong_score(model, task("validation", data), 64, (1024, 1024), seed=VALIDATION_SEED)
        return {"parameters": model.num_parameters(), "validation at 1024": [found.accuracy, found.bits]}

    return cell(RUNS, f"train-{name}-{lr:g}-{seed}", work)


def weights(name: str, lr: float, seed: int) -> Path:
    return RUNS / f"{name}-{lr:g}-{seed}.pt"


def load(name: str, lr: float, seed: int) -> LanguageModel:
    """A trained model."""
    model = make(name)
    model.load_state_dict(torch.load(weights(name, lr, seed), weights_only=True))
    return model.eval()


def test_cell(name: str, lr: float, seed: int, tokens: int, data: str | None) -> Cell:
    """Questions of the test set at one length; other ones, in other places of the book, for every seed."""

    def work() -> Cell:
        found = babilong_score(
            load(name, lr, seed),
            task("test", data),
            TESTS[tokens],
            (tokens, tokens),
            seed=TEST_SEED + seed,
            rows=4 if tokens > ATTENTION_UP_TO else 16,
        )
        return found.to_dict()

    return cell(RUNS, f"test-{name}-{lr:g}-{seed}-{tokens}", work)


def stream_cell(name: str, lr: float, seed: int, data: str | None) -> Cell:
    """The stream, in a process of its own, so that its memory is known."""

    def work() -> Cell:
        options = [name, f"{lr!r}", str(seed), str(STREAM), *([data] if data else [])]
        line = [sys.executable, "-m", "recipes.babilong_stream", *options]
        return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)

    return cell(RUNS, f"stream-{name}-{lr:g}-{seed}-{STREAM}", work)


# --- table ------------------------------------------------------------------------------------------------------


def chosen_rate(swept: dict[str, Cell]) -> float:
    """The rate with the fewest bits per answer; the first among equals."""
    return min(RATES, key=lambda lr: swept[f"{lr:g}"]["bits"])


def report(names: Sequence[str], seeds: int, data: str | None) -> Path:
    """Run what is missing, the important first, and write the result."""
    sweep: dict[str, Cell] = {}
    rates, trained, tests, streams = (dict[str, Any]() for _ in range(4))
    for name in names:
        sweep[name] = {f"{lr:g}": rate_cell(name, lr, data) for lr in RATES}
        lr = rates[name] = chosen_rate(sweep[name])
        trained[name] = [train_cell(name, lr, seed, data) for seed in range(seeds)]
        read = [length for length in TESTS if name != "transformer" or length <= ATTENTION_UP_TO]
        tests[name] = {
            str(length): [test_cell(name, lr, seed, length, data) for seed in range(seeds)] for length in read
        }
        if name in STREAMED:
            best = max(range(seeds), key=lambda seed: trained[name][seed]["validation at 1024"][0])
            streams[name] = [stream_cell(name, lr, best, data) | {"seed": best}]
    metrics: Cell = {"chance": task("test", data).chance, "sweep": sweep, "chosen rate": rates, "trained": trained}
    metrics |= {"tests": tests, "against hope": differences(tests), "streams": streams}
    config = {
        "task": QUESTIONS,
        "version": BABILongTask.version,
        "stages": STAGES,
        "rates": RATES,
        "books": BOOKS,
    }
    config |= {"tokenizer": tokenizer(data).fingerprint, "stream": STREAM} | SHAPE
    return write_result("babilong", config, list(range(seeds)), rounded(metrics))


def differences(tests: dict[str, Cell]) -> Cell:
    """Accuracy of `hope` less that of each other model, paired by seed, by length."""
    made: Cell = {}
    for name, by_length in tests.items():
        for tokens, cells in by_length.items():
            if name != "hope" and "hope" in tests and len(cells) > 1:
                own, other = ([c["accuracy"] for c in some] for some in (tests["hope"][tokens], cells))
                difference = paired(own, other)
                said = {"mean": difference.mean, "low": difference.low, "high": difference.high}
                made.setdefault(name, {})[tokens] = said | {
                    "hope is": verdict(difference, smaller_is_better=False),
                    "accuracy": vars(interval(other)),
                }
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("babilong", __doc__)
    add_data(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    run("babilong", options, lambda: report(options.models, options.seeds, options.data), page, draw)


if __name__ == "__main__":
    main()
