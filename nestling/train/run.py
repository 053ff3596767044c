"""From a config to a trained model: builds what the loop needs, and finds it again in a run folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.data import (
    Corpus,
    Tokenizer,
    Tokens,
    TokenStream,
    held_out_windows,
    load_documents,
    load_tokenizer,
    locate,
    mixture,
    open_shards,
    shuffled,
    split_documents,
    tokenize,
)
from nestling.data.blocks import BLOCK
from nestling.models import LanguageModel, build
from nestling.train.checkpoint import load_weights, newest_weights
from nestling.train.config import DataConfig, RunConfig
from nestling.train.config_file import from_dict
from nestling.train.loop import Evaluate, Say, TrainResult, to_stderr, train
from nestling.train.parallel.ranks import Ranks, joined, ranks_of
from nestling.train.random_state import seed_all
from nestling.train.run_folder import any_weights


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a config stands for."""

    tokenizer: Tokenizer
    training: Corpus
    held_out: Tokens
    model: LanguageModel
    stream: TokenStream


def prepare(config: RunConfig, *, data: str | Path | None = None) -> Prepared:
    """Tokenizer, training and held-out tokens, the stream of this rank's rows, and the model at its first step.

    `data` is the folder of --data.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    training, held_out = load_data(config.data, tokenizer, data, seed=config.train.seed)
    seed_all(config.train.seed)
    model = build(config.model.name, config.model.preset, vocab_size=tokenizer.vocab_size, **config.model.overrides())
    rows, ranks = config.train.rows, joined(config.parallel.sequence, config.parallel.tensor)
    config.rows_per_part(ranks.size)
    stream = TokenStream(training, rows=rows, length=config.train.length, seed=config.train.seed, only=ranks.rows(rows))
    return Prepared(tokenizer=tokenizer, training=training, held_out=held_out, model=model, stream=stream)


def load_data(
    config: DataConfig, tokenizer: Tokenizer, data: str | Path | None = None, *, seed: int = 0
) -> tuple[Corpus, Tokens]:
    """Training and held-out tokens of text or shards; `data` is the folder of --data, `seed` of the order of blocks."""

    def read(name: str) -> Tokens:
        if is_shards(name, data):
            return open_shards(locate(name, data), tokenizer)
        return tokenize(load_documents(name, data), tokenizer)

    if config.validation:
        training, held_out = read(config.text), read(config.validation)
    elif is_shards(config.text, data):
        raise ValueError(f"data.text={config.text} is a folder of shards; name a second one as data.validation")
    else:
        parts = split_documents(load_documents(config.text, data), config.validation_fraction)
        training, held_out = (tokenize(part, tokenizer) for part in parts)
    if config.mixture:
        mixed = {config.text: (training, 1.0)} | {name: (read(name), w) for name, w in config.mixture.items()}
        return mixture(mixed, block=config.shuffle or BLOCK, seed=seed), held_out
    return (shuffled(training, block=config.shuffle, seed=seed) if config.shuffle else training), held_out


def is_shards(name: str, data: str | Path | None) -> bool:
    """Whether `name` is a folder of token shards."""
    try:
        return any(locate(name, data).glob("shard-*.json"))
    except FileNotFoundError:
        return False


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    checkpoint: Path | None = None,
    trust: bool = False,
    say: Say = to_stderr,
) -> tuple[Prepared, TrainResult]:
    """Build what the config says and train it in a run folder; arguments as in `train`.

    Without `evaluate` the validation is the mean loss over fixed held-out windows. Where torchrun started this
    process, it joins the others.
    """
    with ranks_of(config.parallel) as ranks:
        ready = prepare(config, data=data)
        for line in rare_writes(ready.model, config.train.stream_length) if ranks.first else ():
            say(line)
        windows = held_out_windows(ready.held_out, length=config.train.length, count=config.train.eval_windows)
        result = train(
            ready.model,
            ready.stream,
            config,
            folder,
            evaluate=evaluate or HeldOutLoss(windows, max(1, config.train.rows // ranks.size), ranks),
            resume=resume,
            checkpoint=checkpoint,
            trust=trust,
            say=say,
        )
        return ready, result


def rare_writes(model: LanguageModel, stream_length: int) -> list[str]:
    """A warning for every token-clock level that hardly writes before its stream is cleared."""
    return [
        f"{level.name} (period {level.period:.0f}) writes less than twice in a stream of {stream_length} tokens, so "
        f"training hardly sees its writes; use train.stream_length={4 * level.period:.0f} or more"
        for level in model.levels()
        if level.clock == "token" and math.isfinite(level.period) and stream_length <= 2 * level.period
    ]


def resume(
    folder: str | Path, *, data: str | Path | None = None, trust: bool = False, say: Say = to_stderr
) -> tuple[Prepared, TrainResult]:
    """Go on with the run in a folder, with the config that stands there."""
    return run(run_config(folder), folder, data=data, resume=True, trust=trust, say=say)


def run_config(folder: str | Path) -> RunConfig:
    """The config of a run folder. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run.json in {folder}; give the folder of a run")
    try:
        return from_dict(RunConfig, json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); give the folder of another run") from error


def load_run(folder: str | Path, *, say: Say = to_stderr) -> tuple[LanguageModel, Tokenizer]:
    """Model, with the weights of the newest whole checkpoint, and tokenizer of a run folder."""
    config = run_config(folder)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build(config.model.name, config.model.preset, vocab_size=tokenizer.vocab_size, **config.model.overrides())
    weights = newest_weights(Path(folder) / "checkpoints", say, any_weights)
    if weights is None:
        raise FileNotFoundError(f"no checkpoint in {folder} yet; go on with: nestling train --resume {folder}")
    load_weights(model, weights)
    return model, tokenizer


@dataclass(frozen=True)
class HeldOutLoss:
    """A score: mean loss in nats per token over windows (n, T+1), each read from a fresh state with writes on.

    Every rank reads its share of the windows, `rows` at once, and all read equally often.
    """

    windows: Tensor
    rows: int
    ranks: Ranks
    in_step = True  # see `train`

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        device, ranks, count = next(model.parameters()).device, self.ranks, len(self.windows)
        total, mine = 0.0, self.windows[list(ranks.share(count))].to(device)
        for first in range(0, math.ceil(count * ranks.tensor / ranks.size), self.rows):
            part = mine[first : first + self.rows]
            read = part if len(part) else self.windows[:1].to(device)
            loss, _ = model.loss(read[:, :-1], read[:, 1:])  # type: ignore[operator]
            total += float(loss) * len(part)
        return {"loss": ranks.sums([total * (ranks.part == 0)])[0] / count}
