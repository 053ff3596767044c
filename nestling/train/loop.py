"""The training loop. Writes are on: rows are contiguous streams, and what the levels learned is carried on.

    for every step:   read the next tokens of every row with the state of the step before
                      one backward pass, one optimizer step
                      the new state, detached, goes to the next step; it is cleared once per `stream_length` tokens

The loop knows no model: it needs `model.loss(tokens, targets, state=...)` and, for models with old-key statistics,
`model.calibrate(tokens, keep=...)`; several ranks, and what is done to blocks, also need `model.blocks`. One process or
many run the same lines.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nestling.data import TokenStream
from nestling.train.checkpoint import Parts, step_of, write_checkpoint
from nestling.train.checkpoint import checkpoints as list_checkpoints
from nestling.train.config import RunConfig
from nestling.train.config_file import config_to_json
from nestling.train.interrupt import StopSignals
from nestling.train.journal import Journal
from nestling.train.parallel.ranks import Ranks, joined, watched
from nestling.train.run_folder import RunFolder, read_any
from nestling.train.trainer import Trainer, due

Evaluate = Callable[[nn.Module], dict[str, float]]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int  # the last step that is done
    finished: bool
    stopped_by: str  # name of the signal that stopped it, or empty


class Checkpoints(Protocol):
    """What writes the checkpoints of a run."""

    def save(self, trainer: Trainer) -> None: ...

    def settle(self) -> None:
        """Finish what was begun, if that takes no waiting."""

    def wait(self) -> None:
        """Finish what was begun."""


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

    Where torchrun started several ranks, every rank calls this with the same model and its own rows of the stream.

    Args:
        evaluate: scores the model on held-out text; its numbers go into metrics.jsonl under "validation". Every rank
            calls it, with whole weights; or, if it has an attribute `in_step` that is True and all ranks call
            `model.loss` equally often and on equal lengths, with weights as they are in a step.
        resume: go on with a folder that is not empty. checkpoint: go on from this one instead of the newest.
        trust: allow a checkpoint from outside the run folder.
        say: takes the few messages; progress goes to stderr.
    Raises FileExistsError, ValueError (another config, other data, an untrusted checkpoint), FloatingPointError when
    the loss is no longer finite, ConnectionError when another rank is gone, and OSError when the disk is full; each
    message says how to go on.
    """
    ranks, steps = joined(config.parallel.sequence, config.parallel.tensor), config.train.steps
    trainer = Trainer(model, stream, config, ranks)
    with RunFolder(folder, identity_of(config, stream), say=say if ranks.first else silent) as run:
        with watched(ranks, lambda: how_to_resume(run)):
            ranks.from_first(lambda: run.open(resume=resume, ranks=ranks.size))
            load(run, trainer, checkpoint, trust)
            checkpoints = checkpoints_of(run, trainer)
            stopping = run_steps(trainer, run, checkpoints, evaluate)
            checkpoints.wait()
        if trainer.step < steps:
            run.say(f"stopped by {stopping} after step {trainer.step} of {steps}; {how_to_resume(run)}")
        return TrainResult(step=trainer.step, finished=trainer.step == steps, stopped_by=stopping)


def run_steps(trainer: Trainer, run: RunFolder, checkpoints: Checkpoints, evaluate: Evaluate | None) -> str:
    """All steps that are left, or those until a signal; its name."""
    config, ranks, stopping = trainer.config.train, trainer.ranks, ""
    with StopSignals() as stop, Journal(run, trainer.config, done=trainer.step, keeps=ranks.first) as journal:
        while trainer.step < config.steps and not stopping:
            try:
                record = trainer.next_step()
                if evaluate is not None and due(trainer.step, config.eval_every, config.steps):
                    in_step = getattr(evaluate, "in_step", False)
                    with trainer.layout.in_step() if in_step else trainer.layout.gathered():
                        record["validation"] = evaluate(trainer.model)
                journal.append(record)
                stopping = agreed(stop.received, ranks)
                if stopping or (due(trainer.step, config.checkpoint_every, config.steps) and may_save(trainer)):
                    journal.sync()
                    checkpoints.save(trainer)
                checkpoints.settle()
                journal.show(record)
                if "skipped" in record:
                    run.say(f"step {trainer.step} left out: {trainer.guard.fault}")
                if trainer.guard.exhausted:
                    go_back(run, trainer, checkpoints, journal)
            except (OSError, FloatingPointError) as error:
                kind = OSError if isinstance(error, OSError) else FloatingPointError
                raise kind(f"stopped in step {trainer.step}: {error}; {how_to_resume(run)}") from error
    return stopping


def silent(line: str) -> None:
    """Where the messages of all ranks but the first go."""


class WholeCheckpoints:
    """Checkpoints of one process, written at once."""

    def __init__(self, run: RunFolder, config: RunConfig) -> None:
        self.run, self.config = run, config.train

    def save(self, trainer: Trainer) -> None:
        parts, config = trainer.parts(self.run.identity), self.config
        write_checkpoint(self.run.checkpoints, trainer.step, parts, keep=config.keep, keep_every=config.keep_every)

    def settle(self) -> None:
        pass

    def wait(self) -> None:
        pass


def checkpoints_of(run: RunFolder, trainer: Trainer) -> Checkpoints:
    """What writes the checkpoints: this process alone, or all ranks together."""
    if trainer.ranks.size == 1:
        return WholeCheckpoints(run, trainer.config)
    from nestling.train.sharded import ShardedCheckpoints

    return ShardedCheckpoints(run.checkpoints, trainer.ranks, run.identity, trainer.config)


def load(run: RunFolder, trainer: Trainer, checkpoint: Path | None, trust: bool) -> bool:
    """Go on from a checkpoint, or from the newest whole one if there is one; whether there was."""
    ranks, found = trainer.ranks, list[Parts]()

    def choose() -> str | None:
        chosen = run.starting_point(checkpoint, trust=trust)
        if chosen is None:
            return None
        found.append(chosen[1])
        return str(chosen[0])

    path = ranks.from_first(choose)
    if path is None:
        return False
    parts = found[0] if found else read_any(Path(path))
    if "sharded" in parts:
        from nestling.train.sharded import load_sharded

        load_sharded(Path(path), trainer)
    else:
        trainer.load(parts)
    return True


def may_save(trainer: Trainer) -> bool:
    """Whether these weights may be gone back to: not while steps go wrong, unless they are the last ones."""
    return trainer.guard.bad == 0 or trainer.step == trainer.config.train.steps


def go_back(run: RunFolder, trainer: Trainer, checkpoints: Checkpoints, journal: Journal) -> None:
    """Load the last checkpoint, and read on behind the text that went wrong. Raises FloatingPointError instead if
    there is none, or if this has not helped before."""
    guard, position, step = trainer.guard, trainer.stream.position, trainer.step
    before, fault = guard.rollbacks, guard.fault
    checkpoints.wait()
    if guard.gives_up or not load(run, trainer, None, True):
        raise FloatingPointError(
            f"{guard.bad} bad steps in a row ({fault}) after {before} returns to a checkpoint; use a smaller optim.lr"
        )
    trainer.guard.went_back(before)
    trainer.stream.position = position
    journal.begin(trainer.step)
    run.say(f"{fault} in step {step} and before: back to step {trainer.step}, reading on behind that text")


def agreed(received: str, ranks: Ranks) -> str:
    """The name of the signal that any rank has received: all stop after the same step."""
    number = ranks.largest([signal.Signals[received].value if received else 0])[0]
    return signal.Signals(int(number)).name if number else ""


def identity_of(config: RunConfig, stream: TokenStream) -> dict[str, Any]:
    """What must be equal for a run to be resumed, as plain values."""
    data = {"tokens": stream.tokens.fingerprint, "count": len(stream.tokens), "tokenizer": stream.tokens.tokenizer}
    return {"config": json.loads(config_to_json(config)), "data": data}


def how_to_resume(run: RunFolder) -> str:
    """The end of every message that a run stops with."""
    complete = list_checkpoints(run.checkpoints)
    if not complete:
        return f"no checkpoint yet, so `nestling train --resume {run.path}` starts again from step 0"
    return f"saved up to step {step_of(complete[-1])}; go on with: nestling train --resume {run.path}"
