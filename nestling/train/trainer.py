"""Trainer: what changes from step to step, and the step itself, on one process or on this rank's share of the rows."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from nestling.data import Batch, TokenStream
from nestling.models.state import State
from nestling.train.calibration import calibrate
from nestling.train.checkpoint import Parts, load_weights
from nestling.train.compile import compile_blocks
from nestling.train.config import RunConfig, TrainConfig
from nestling.train.guard import Guard
from nestling.train.metrics import peak_memory, write_counts, write_norms
from nestling.train.optimizer import learning_rate, load_optimizer_tree, make_optimizer, optimizer_tree, set_rate
from nestling.train.parallel.alone import Alone, Layout
from nestling.train.parallel.ranks import Ranks, local_device
from nestling.train.parallel.sequence import Relay, check_sequence
from nestling.train.random_state import random_state, set_random_state
from nestling.train.settled import settled


class Trainer:
    """Model, optimizer, stream, the state of this rank's rows, and the counts.

    `stream` gives the rows of this rank; a step's gradient is the mean over the predicted tokens of all ranks.
    """

    def __init__(self, model: nn.Module, stream: TokenStream, config: RunConfig, ranks: Ranks | None = None) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        config.rows_per_part(self.ranks.size)
        if self.ranks.sequence > 1:
            check_sequence(model.config, config.train.length, self.ranks.sequence)  # type: ignore[arg-type]
        self.device = usable_device(config.train)
        self.model: Any = model.to(self.device).train()
        self.stream, self.config = stream, config
        if config.parallel.recompute:
            recompute_blocks(self.model)
        if config.train.compile:
            compile_blocks(self.model, config, self.ranks)
        self.layout = layout_of(self.model, config, self.ranks, self.device)
        self.relay = Relay(self.model, self.ranks, self.device)
        self.optimizer = make_optimizer(model, config.optim)
        self.guard = Guard(config.guard)
        self.state: State | None = None
        self.step, self.seconds = 0, 0.0

    def next_step(self) -> dict[str, Any]:
        """Read the next tokens of every row, learn from them; the line for metrics.jsonl.

        Raises FloatingPointError for a bad step, unless the guard may leave it out.
        """
        config, began = self.config.train, time.monotonic()
        batch = next(self.stream).to(self.device)
        before = self.carried()
        rate = learning_rate(self.step + 1, config.steps, self.config.optim)
        set_rate(self.optimizer, rate, self.config.optim)

        loss, gradient_norm = self.backward(batch, before)
        good = self.guard.judge(loss, gradient_norm)
        if good:
            self.optimizer.step()
        else:
            self.leave_out(before)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if due(self.step, config.calibrate_every, config.steps):
            with self.layout.in_step():
                calibrate(self.model, self.stream, device=self.device)

        seconds = time.monotonic() - began
        self.seconds += seconds
        return {
            "step": self.step,
            "tokens": self.step * config.rows * config.length,
            "loss": loss,
            "lr": rate,
            "grad_norm": gradient_norm,
            **self.writes(before),
            "tokens_per_second": config.rows * config.length / seconds,
            "peak_memory": int(self.ranks.largest([peak_memory(self.device)])[0]),
            "seconds": self.seconds,
            **({} if good else {"skipped": True}),
        }

    def carried(self) -> State | None:
        """The state that the next step starts from: None at the beginning of a stream."""
        config = self.config.train
        if self.state is None or self.step * config.length % config.stream_length == 0:
            return None
        return self.state if config.carry_context else self.state.reset_context()

    def backward(self, batch: Batch, before: State | None) -> tuple[float, float]:
        """Backward passes and clipping; the loss of all ranks in nats per token, and the norm before clipping."""
        parts = parts_of(self.relay.mine(batch), before, self.config.parallel.accumulate)
        counts = [int((part.targets >= 0).sum()) for part, _ in parts]
        total = self.ranks.sums([sum(counts)])[0]
        value, after = 0.0, list[State]()
        with self.layout.in_step(self.ranks.size / total):
            for (part, state), count in zip(parts, counts, strict=True):
                state = self.relay.take(state)
                with self.precision():
                    loss, new = self.model.loss(part.inputs, part.targets, state=state, new_document=part.borders)
                after.append(State(settled(new.tree), self.model))
                self.relay.give(after[-1])
                self.layout.reduce_next(len(after) == len(parts))
                (loss * (count * self.ranks.size / total)).backward()  # FSDP2 takes the mean over ranks
                self.layout.reduce_next(False)
                value += float(loss.detach()) * (count / total)
        after = self.relay.end(after)
        norm = self.layout.clip(self.config.optim.clip_norm)
        self.state = after[0] if len(after) == 1 else State.stack(after)
        return self.ranks.sums([value])[0], norm

    def precision(self) -> torch.autocast:
        """Of the arithmetic of a step. Weights that are freed after a pass leave no copy in bfloat16 behind."""
        config = self.config
        cache = not config.parallel.reshard
        return torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.bf16, cache_enabled=cache)

    def leave_out(self, before: State | None) -> None:
        """Forget what a bad step did to the state. Raises FloatingPointError if it may not be left out."""
        if self.config.guard.skips == 0:
            raise FloatingPointError(
                f"step {self.step + 1} has {self.guard.fault}; "
                f"use a smaller optim.lr than {self.config.optim.lr} in a new run folder"
            )
        self.state = before

    def writes(self, before: State | None) -> dict[str, Any]:
        """Number of writes of each level, summed over all rows, and their mean length."""
        if self.state is None:
            return {"writes": [], "write_norms": {}}
        counts, norms = write_counts(before, self.state), write_norms(self.state)
        sums = self.ranks.sums([value * self.ranks.speaks for value in (*counts, *norms.values())])
        share = self.ranks.sequence * self.ranks.tensor  # ranks of the same rows, one of which speaks
        means = [value * share / self.ranks.size for value in sums[len(counts) :]]
        return {
            "writes": [int(count) for count in sums[: len(counts)]],
            "write_norms": dict(zip(norms, means, strict=True)),
        }

    @property
    def progress(self) -> dict[str, Any]:
        """Counts and positions, as plain values."""
        saved = {"step": self.step, "seconds": self.seconds, "stream": self.stream.state_dict()}
        return saved | {"guard": self.guard.state_dict()}

    def parts(self, identity: dict[str, Any]) -> Parts:
        """Everything a checkpoint must hold for the next step to be the same, bit for bit."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_tree(self.optimizer),
            "state": None if self.state is None else self.state.tree,
            "random": random_state(),
            "progress": self.progress,
            "identity": identity,
        }

    def load(self, parts: Parts) -> None:
        """Go on where `parts` was taken, by one process; of its rows this rank takes its own."""
        now, part = self.model.state_dict(), self.layout.part
        mine = {name: part(name, w, now[name]) if name in now else w for name, w in parts["model"].items()}
        load_weights(self.model, mine)
        named = {p: name for name, p in self.model.named_parameters()}
        load_optimizer_tree(self.optimizer, parts["optimizer"], lambda made, p: part(named[p], made, p))
        state = None if parts["state"] is None else State(parts["state"], self.model)
        if state is not None and self.ranks.size > 1:
            state = state.select(list(self.ranks.rows(state.rows)))
            state = State(self.layout.state_part(state.tree), self.model)
        self.go_on(state, parts["random"], parts["progress"])

    def go_on(self, state: State | None, random: dict[str, Any], progress: dict[str, Any]) -> None:
        """Take over what is neither weights nor optimizer."""
        self.state = None if state is None else state.to(self.device)
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.stream.load_state_dict(progress["stream"])
        if "guard" in progress:  # runs of version 0.1 have none
            self.guard.load_state_dict(progress["guard"])
        set_random_state(random)


def recompute_blocks(model: Any) -> None:
    """Let the backward pass compute what is inside of blocks again."""
    for block in model.blocks:
        block.recompute = True


def layout_of(model: nn.Module, config: RunConfig, ranks: Ranks, device: torch.device) -> Layout:
    """All of the model here, or this rank's part of it. Raises ValueError for what `parallel.reshard` cannot train."""
    if ranks.size == 1:
        return Alone(model)
    from nestling.train.parallel.fsdp import Sharded, mesh_of  # loads FSDP2, which takes a second

    mesh = mesh_of(ranks, config.parallel, device)
    if not config.parallel.reshard:
        return Sharded(model, mesh)
    from nestling.train.parallel.reshard import Resharded, check_reshard

    check_reshard(model.config, config.rows_per_part(ranks.size) * config.train.length)  # type: ignore[arg-type]
    return Resharded(model, mesh, ranks)


def parts_of(batch: Batch, state: State | None, count: int) -> list[tuple[Batch, State | None]]:
    """The rows of a batch, and their state, in `count` equal parts."""
    if count == 1:
        return [(batch, state)]
    rows = torch.arange(len(batch.tokens)).chunk(count)
    return [(batch.select(index), None if state is None else state.select(index)) for index in rows]


def usable_device(config: TrainConfig) -> torch.device:
    """The device of the config. Raises ValueError if this machine does not have it, or not in bfloat16."""
    try:
        device = torch.device(local_device(config.device))
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
