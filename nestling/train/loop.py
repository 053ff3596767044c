"""The training loop. Writes are on: rows are contiguous streams, and what the levels learned is carried on.

    for every step:   read the next tokens of every row with the state of the step before
                      one backward pass, one optimizer step
                      the new state, detached, goes to the next step; it is cleared once per `stream_length` tokens

The loop knows no model: it needs `model.loss(tokens, targets, state=...)` and, for models with old-key statistics,
`model.calibrate(tokens, keep=...)`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestling.data import Batch, TokenStream
from nestling.models.state import State
from nestling.train.calibration import calibrate
from nestling.train.checkpoint import Parts, load_weights, write_checkpoint
from nestling.train.config import RunConfig, TrainConfig
from nestling.train.config_file import config_to_json
from nestling.train.interrupt import StopSignals
from nestling.train.metrics import MetricsFile, cut_back, peak_memory, write_counts, write_norms
from nestling.train.optimizer import learning_rate, load_optimizer_tree, make_optimizer, optimizer_tree, set_rate
from nestling.train.progress import Followers
from nestling.train.random_state import random_state, set_random_state
from nestling.train.run_folder import RunFolder
from nestling.train.settled import settled

Evaluate = Callable[[nn.Module], dict[str, float]]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int  # the last step that is done
    finished: bool
    stopped_by: str  # name of the signal that stopped it, or empty


def to_stderr(line: str) -> None:
    """Where messages go by default."""
    print(line, file=sys.stderr, flush=True)


def train(
    model: nn.Module,
    stream: TokenStream,
    config: RunConfig,
    folder: str | Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    checkpoint: Path | None = None,
    trust: bool = False,
    say: Say = to_stderr,
) -> TrainResult:
    """Train `model` on `stream` inside a run folder, from the beginning or from the newest checkpoint.

    Args:
        evaluate: scores the model on held-out text; its numbers go into metrics.jsonl under "validation".
        resume: go on with a folder that is not empty. checkpoint: go on from this one instead of the newest.
        trust: allow a checkpoint from outside the run folder.
        say: takes the few messages; progress goes to stderr.
    Raises FileExistsError, ValueError (another config, other data, an untrusted checkpoint), FloatingPointError when
    the loss is no longer finite, and OSError when the disk is full; each message says how to go on.
    """
    steps = config.train.steps
    trainer = Trainer(model, stream, config)
    with RunFolder(folder, identity_of(config, stream), resume=resume, say=say) as run:
        parts = run.starting_point(checkpoint, trust=trust)
        if parts is not None:
            trainer.load(parts)
        saved = trainer.step
        cut_back(run.metrics, trainer.step)
        with (
            StopSignals() as stop,
            MetricsFile(run.metrics) as metrics,
            Followers(run.path, steps=steps, done=trainer.step, tensorboard=config.train.tensorboard) as followers,
        ):
            stopping = ""
            while trainer.step < steps and not stopping:
                try:
                    record = trainer.next_step()
                    if evaluate is not None and due(trainer.step, config.train.eval_every, steps):
                        record["validation"] = evaluate(model)
                    metrics.append(record)
                    stopping = stop.received
                    if stopping or due(trainer.step, config.train.checkpoint_every, steps):
                        metrics.sync()
                        write_checkpoint(run.checkpoints, trainer.step, trainer.parts(run.identity))
                        saved = trainer.step
                except (OSError, FloatingPointError) as error:
                    kind = OSError if isinstance(error, OSError) else FloatingPointError
                    raise kind(f"stopped in step {trainer.step}: {error}; {how_to_resume(run, saved)}") from error
                followers.update(record)
        if trainer.step < steps:
            say(f"stopped by {stopping} after step {trainer.step} of {steps}; {how_to_resume(run, saved)}")
        return TrainResult(step=trainer.step, finished=trainer.step == steps, stopped_by=stopping)


class Trainer:
    """What changes from step to step: model, optimizer, stream, the state of the rows, and the counts."""

    def __init__(self, model: nn.Module, stream: TokenStream, config: RunConfig) -> None:
        self.device = usable_device(config.train)
        self.model: Any = model.to(self.device).train()
        self.stream, self.config = stream, config
        self.optimizer = make_optimizer(model, config.optim)
        self.state: State | None = None
        self.step, self.seconds = 0, 0.0

    def next_step(self) -> dict[str, Any]:
        """Read the next tokens of every row, learn from them; the line for metrics.jsonl."""
        config, began = self.config.train, time.monotonic()
        batch = next(self.stream).to(self.device)
        before = self.carried()
        rate = learning_rate(self.step + 1, config.steps, self.config.optim)
        set_rate(self.optimizer, rate)

        loss, gradient_norm = self.backward(batch, before)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if due(self.step, config.calibrate_every, config.steps):
            calibrate(self.model, self.stream, device=self.device)

        assert self.state is not None
        seconds = time.monotonic() - began
        self.seconds += seconds
        return {
            "step": self.step,
            "tokens": self.step * config.rows * config.length,
            "loss": loss,
            "lr": rate,
            "grad_norm": gradient_norm,
            "writes": write_counts(before, self.state),
            "write_norms": write_norms(self.state),
            "tokens_per_second": config.rows * config.length / seconds,
            "peak_memory": peak_memory(self.device),
            "seconds": self.seconds,
        }

    def carried(self) -> State | None:
        """The state that the next step starts from: None at the beginning of a stream."""
        config = self.config.train
        if self.state is None or self.step * config.length % config.stream_length == 0:
            return None
        return self.state if config.carry_context else self.state.reset_context()

    def backward(self, batch: Batch, before: State | None) -> tuple[float, float]:
        """One backward pass and clipping; loss in nats per token and the norm before clipping."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.bf16):
            loss, after = self.model.loss(batch.inputs, batch.targets, state=before, new_document=batch.borders)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        value, size = float(loss.detach()), float(norm)
        if not (math.isfinite(value) and math.isfinite(size)):
            raise FloatingPointError(
                f"step {self.step + 1} has loss {value} and gradient norm {size}; "
                f"use a smaller optim.lr than {self.config.optim.lr} in a new run folder"
            )
        self.state = State(settled(after.tree), self.model)
        return value, size

    def parts(self, identity: dict[str, Any]) -> Parts:
        """Everything a checkpoint must hold for the next step to be the same, bit for bit."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_tree(self.optimizer),
            "state": None if self.state is None else self.state.tree,
            "random": random_state(),
            "progress": {"step": self.step, "seconds": self.seconds, "stream": self.stream.state_dict()},
            "identity": identity,
        }

    def load(self, parts: Parts) -> None:
        """Go on where `parts` was taken."""
        load_weights(self.model, parts["model"])
        load_optimizer_tree(self.optimizer, parts["optimizer"])
        tree = parts["state"]
        self.state = None if tree is None else State(tree, self.model).to(self.device)
        self.step, self.seconds = parts["progress"]["step"], parts["progress"]["seconds"]
        self.stream.load_state_dict(parts["progress"]["stream"])
        set_random_state(parts["random"])


def usable_device(config: TrainConfig) -> torch.device:
    """The device of the config. Raises ValueError if this machine does not have it, or not in bfloat16."""
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"train.device={config.device!r} is no device of torch; use cpu or cuda") from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(f"train.device={config.device!r} is not here ({found} CUDA devices found); use cpu")
    if config.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"train.bf16=True, but {config.device} has no bfloat16; leave train.bf16 out")
    return device


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0 = never) and after the last one happens now."""
    return step == last or (every > 0 and step % every == 0)


def identity_of(config: RunConfig, stream: TokenStream) -> dict[str, Any]:
    """What must be equal for a run to be resumed, as plain values."""
    data = {"tokens": stream.tokens.fingerprint, "count": len(stream.tokens), "tokenizer": stream.tokens.tokenizer}
    return {"config": json.loads(config_to_json(config)), "data": data}


def how_to_resume(run: RunFolder, saved: int) -> str:
    """The end of every message that a run stops with."""
    if saved == 0:
        return f"no checkpoint yet, so `nestling train --resume {run.path}` starts again from step 0"
    return f"saved up to step {saved}; go on with: nestling train --resume {run.path}"
