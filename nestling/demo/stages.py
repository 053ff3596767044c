"""The stages of the demo; each returns its part of the results."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nestling import train
from nestling.data import Tokenizer, Tokens, held_out_windows
from nestling.demo import restart
from nestling.demo.results import HeldOut, Memory, Read, Samples, Training
from nestling.demo.settings import Settings
from nestling.evals import ReadResult, bits_per_byte, perplexity, read_text, reconfigured
from nestling.models import LanguageModel, State, save_state
from nestling.train import RunConfig

PARTS = 32  # points of a curve along a text or window


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, what it was trained with, and how that went."""

    model: LanguageModel
    tokenizer: Tokenizer
    held_out: Tokens
    training: Training


def trained(config: RunConfig, folder: Path) -> Trained:
    """Train one model in a run folder. Raises KeyboardInterrupt if a signal stops it."""
    ready, result = train.run(config, folder)
    if not result.finished:
        raise KeyboardInterrupt
    records = train.read_metrics(folder / "metrics.jsonl")
    training = Training(
        parameters=ready.model.num_parameters(),
        steps=result.step,
        tokens=records[-1]["tokens"],
        seconds=records[-1]["seconds"],
        validation=tuple((r["tokens"], r["validation"]["loss"]) for r in records if "validation" in r),
    )
    return Trained(model=ready.model.eval(), tokenizer=ready.tokenizer, held_out=ready.held_out, training=training)


def scored(hope: Trained, transformer: Trained, settings: Settings) -> dict[str, HeldOut]:
    """Frozen losses on held-out windows: Hope, and the Transformer with full and with windowed attention."""
    short = held_out_windows(hope.held_out, length=settings.length, count=settings.windows)
    long = held_out_windows(hope.held_out, length=4 * settings.length, count=settings.long_windows)
    models = {
        "hope": hope.model,
        "transformer": reconfigured(transformer.model, window=None),
        "transformer-window": transformer.model,
    }
    found = {}
    for name, model in models.items():
        far = perplexity(model, long, buckets=PARTS)
        found[name] = HeldOut(
            short=perplexity(model, short).total.nats,
            long=far.total.nats,
            by_position=tuple(((p.start + p.end) / 2, p.nats) for p in far.by_position),
        )
    return found


def read_once(model: LanguageModel, tokens: Tensor, settings: Settings, *, learn: bool) -> tuple[Read, ReadResult]:
    """Read tokens (1, T), one token per byte."""
    began = time.monotonic()
    result = read_text(model, tokens, learn=learn, call_size=settings.call)
    read = Read(
        whole=bits_per_byte(result.nats()),
        first_half=bits_per_byte(result.nats(0.0, 0.5)),
        second_half=bits_per_byte(result.nats(0.5)),
        by_position=tuple((at, bits_per_byte(nats)) for at, nats in result.curve(PARTS)),
        writes=result.writes,
        seconds=time.monotonic() - began,
    )
    return read, result


def restarted(model: LanguageModel, state: State, folder: Path, rest: list[int]) -> Memory:
    """Save the memory, let a new process load it and read on, and compare with this process."""
    file = folder / "memory.safetensors"
    save_state(state, file)
    here, there = restart.going_on(model, state, rest), restart.in_a_new_process(folder / "hope", file, rest)
    return Memory(
        file=file.name,
        bytes=file.stat().st_size,
        tensors=here["tensors"],
        equal_state=here["state"] == there["state"],
        equal_reading=here["losses"] == there["losses"],
        next=len(rest),
    )


def sampled(hope: Trained, state: State, rest: list[int], length: int, seed: int) -> Samples:
    """Continue the beginning of `rest` without and with what was learned, from the same random numbers."""
    prompt = rest[:64]

    def continuation(start: State | None) -> str:
        made = hope.model.generate(
            torch.tensor([prompt]), length, start, temperature=0.7, learn_prompt=False,
            generator=torch.Generator().manual_seed(seed),
        ).all()  # fmt: skip
        return hope.tokenizer.decode(made[0].tolist())

    return Samples(
        prompt=hope.tokenizer.decode(prompt), before=continuation(None), after=continuation(state.reset_context())
    )


def level_names(model: LanguageModel, paths: list[str]) -> dict[str, str]:
    """A label for the path of each CMS level: its block and its period."""
    names = {}
    for path in paths:
        level = model.get_submodule(path)
        names[path] = f"block {path.split('.')[1]}, every {level.period:,.0f} tokens"
    return names
