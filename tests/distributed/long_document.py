"""One long document on one process and in two stretches on two: loss and gradients.

    python -m tests.distributed.long_document --tokens 262144

Prints the largest difference of a gradient, relative to the largest entry of its tensor, and that of the losses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from nestling.bench.plan import trainer_of
from nestling.core.spread import whole
from nestling.models import config_of
from nestling.train import RunConfig, TrainConfig
from nestling.train.parallel.ranks import joined
from nestling.train.trainer import Trainer
from tests.distributed.programs import together

MODEL = config_of("hope", dim=16, depth=1, heads=1, chunk_size=64, periods=(4096.0, 16384.0))


def step(tokens: int, sequence: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over a document."""
    config = RunConfig(train=TrainConfig(rows=1, length=tokens, stream_length=tokens, seed=1))
    alone = trainer_of(config, MODEL, 1, "cpu")
    config = replace(alone.config, parallel=replace(config.parallel, sequence=sequence))
    torch.manual_seed(0)
    trainer = Trainer(type(alone.model)(MODEL), alone.stream, config, joined(sequence))
    loss, _ = trainer.backward(next(trainer.stream), None)
    return loss, {name: whole(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None}


def compare(tokens: int, folder: Path) -> dict[str, float]:
    """The differences between one process and two."""

    def work(rank: int) -> None:
        found = step(tokens, 2)
        if rank == 0:
            torch.save(found, folder / "two.pt")

    together(2, folder, work)
    (loss, grads), (other, others) = step(tokens, 1), torch.load(folder / "two.pt")
    apart = max(float((others[name] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for name, g in grads.items())
    return {"tokens": tokens, "loss": loss, "loss_difference": abs(loss - other), "gradient_difference": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1 << 18)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(parser.parse_args().tokens, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
