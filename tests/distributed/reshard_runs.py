"""Run by test_reshard.py: small runs whose blocks are gathered pass by pass, and the same by one process; what differs
is printed as JSON.

    python -m tests.distributed.reshard_runs FOLDER
"""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nestling.bench.measure import peak_bytes
from nestling.bench.plan import GPUS, exchanged, plan, shares
from nestling.data import Tokens, TokenStream
from nestling.models import config_of as model_config
from nestling.models import from_config
from nestling.models.reader import Reader
from nestling.train import ParallelConfig, RunConfig, TrainConfig, prepare
from nestling.train.parallel.ranks import joined
from nestling.train.trainer import Trainer
from tests.distributed.programs import begun, difference, quiet_run, saved, together
from tests.distributed.train_runs import config_of

LAYOUTS = {
    "whole": ParallelConfig(),
    "reshard": ParallelConfig(reshard=True),
    "two parts": ParallelConfig(reshard=True, accumulate=2),
}
STEPS = 6
ROUNDS = ("_advance", "_read_again", "_keep_company")


def blocks_of(config: RunConfig, depth: int, **train: Any) -> RunConfig:
    """The run with several blocks, of fewer steps, calibrated after the checkpoint in the middle."""
    train = {"steps": STEPS, "checkpoint_every": STEPS // 2, "calibrate_every": STEPS // 2 + 1} | train
    return replace(config, model=replace(config.model, depth=depth), train=replace(config.train, **train))


def resharded(config: RunConfig, **parallel: Any) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, reshard=True, **parallel))


def without_levels() -> RunConfig:
    """A Transformer over the same documents."""
    made = blocks_of(config_of(), 2)
    return replace(made, model=replace(made.model, name="transformer", periods=None))


def watch(trainer: Trainer) -> list[tuple[str, int, list[int]]]:
    """Notes, whenever a block begins a pass, which blocks are whole."""
    seen: list[tuple[str, int, list[int]]] = []
    blocks = list(trainer.model.blocks)

    def note(what: str, index: int) -> None:
        parts = [[isinstance(p, DTensor) for p in block.parameters()] for block in blocks]
        seen.append((what, index, [i for i, spread in enumerate(parts) if not all(spread)]))

    def watched(index: int, block: Any) -> None:
        def after(block: Any, inputs: Any, output: Any) -> None:
            if output[0].requires_grad:
                output[0].register_hook(lambda grad: note("backward", index))

        block.register_forward_pre_hook(lambda block, inputs: note("forward", index))
        block.register_forward_hook(after)

    for i, block in enumerate(blocks):
        watched(i, block)
    return seen


def count_rounds() -> Counter[str]:
    """How often a reader of this process does what may be an exchange, from now on."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        real = getattr(Reader, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*args, **options)

        setattr(Reader, name, call)

    for name in ROUNDS:
        counted(name)
    return counts


def observe_steps(rank: int, folder: Path, data: Path) -> None:
    """Four steps of three blocks: what is whole when, and the passes of this rank."""
    config = blocks_of(resharded(config_of()), 3)
    ready = prepare(config, data=data)
    trainer = Trainer(ready.model, ready.stream, config, joined())
    seen, counts = watch(trainer), count_rounds()
    for _ in range(4):
        trainer.next_step()
    spread = all(isinstance(p, DTensor) for p in trainer.model.parameters())
    found = {"passes": seen, "counts": counts, "spread": spread}
    (folder / f"passes-{rank}.json").write_text(json.dumps(found))


class Exchanged(TorchDispatchMode):
    """Counts the numbers that are gathered, and reduced in parts, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}.get(func._schema.name)
        if whole is not None:
            self.numbers += args[whole].numel()
        return func(*args, **(kwargs or {}))


def plans(rank: int, folder: Path) -> None:
    """What a step holds beyond what lies there between steps, and exchanges, planned and counted, in float32."""
    torch.set_default_dtype(torch.float32)
    transformer = model_config("transformer", dim=64, depth=8, heads=2, vocab_size=64)
    hope = model_config("hope", dim=16, depth=3, heads=2, vocab_size=64, chunk_size=4, periods=(4.0, 8.0))
    ids, found = np.random.default_rng(0).integers(0, 64, size=400), {}
    tokens = Tokens(pieces=[ids], starts=np.zeros(1, dtype=np.int64), tokenizer="random", fingerprint="random")
    for (model, length), (layout, parallel) in product(((transformer, 2), (hope, 8)), LAYOUTS.items()):
        rows = 2 * parallel.accumulate
        train = TrainConfig(rows=rows, length=length, stream_length=length << 10, calibrate_every=0, steps=1000)
        config = RunConfig(train=train, parallel=parallel)
        stream = TokenStream(tokens, rows=rows, length=length, only=joined().rows(rows))
        trainer = Trainer(from_config(model), stream, config, joined())
        trainer.next_step()
        with Exchanged() as counted:
            trainer.next_step()
        planned = exchanged(trainer.model, config, shares(trainer.model, 1))
        found[f"{model.name}, {layout}"] = {"numbers": {"planned": planned, "counted": counted.numbers}}
        if model is transformer and parallel.accumulate == 1:
            gc.collect()
            held = min(peak_bytes(trainer.next_step) for _ in range(6))  # gloo may hold a buffer for a moment longer
            made = plan(config, model, 2, GPUS["h100"])
            resting = 2 * made.parameters + made.memory["optimizer"]  # half of the weights, 4 bytes each
            bytes_ = {"weights": 4 * made.parameters, "planned": made.bytes - resting, "counted": held}
            found[f"{model.name}, {layout}"]["bytes"] = bytes_
    (folder / f"plans-{rank}.json").write_text(json.dumps(found))


def resumed(folder: Path, data: Path, config: RunConfig, whole: Path) -> dict[str, Any]:
    """The run goes on from its checkpoint of the middle: as it was, and by one process."""
    for name in ("same", "one"):
        shutil.copytree(whole, folder / name)
        shutil.rmtree(saved(folder / name, STEPS))
    together(2, folder, lambda rank: quiet_run(config, folder / "same", data, resume=True))
    quiet_run(replace(config, parallel=ParallelConfig()), folder / "one", data, resume=True)
    return {name: difference(folder / name, whole, STEPS) for name in ("same", "one")}


def main() -> None:
    folder = begun()
    hope, found = blocks_of(config_of(), 2), dict[str, Any]()
    quiet_run(hope, folder / "hope-1", folder)
    outer = replace(hope, model=replace(hope.model, options={"outer": "sequence"}))
    quiet_run(outer, folder / "outer-1", folder)
    quiet_run(without_levels(), folder / "transformer-1", folder)
    cases = {
        "hope": (resharded(hope, accumulate=2, recompute=True), 2, "hope-1"),
        "hybrid": (resharded(hope, shard=2), 4, "hope-1"),
        "outer": (resharded(outer), 2, "outer-1"),
        "transformer": (resharded(without_levels()), 2, "transformer-1"),
    }
    for name, (config, size, alone) in cases.items():
        together(size, folder, lambda rank: quiet_run(config, folder / name, folder))  # noqa: B023
        found[name] = difference(folder / name, folder / alone, STEPS)
    (folder / "resumed").mkdir()
    found["resumed"] = resumed(folder / "resumed", folder, cases["hope"][0], folder / "hope")
    together(2, folder, lambda rank: observe_steps(rank, folder, folder))
    together(2, folder, lambda rank: plans(rank, folder))
    for name in ("passes", "plans"):
        found[name] = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
