"""What the demo trains and reads, at full length and as a quick check of the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nestling.train import ModelChoice, OptimConfig, RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Two runs on the same tokens, and what is read and scored afterwards. Lengths in tokens (bytes)."""

    hope: RunConfig
    transformer: RunConfig
    read: int  # of the unseen text
    next: int  # of the text after that, read by both processes to compare bits
    windows: int  # held-out windows of the training length
    long_windows: int  # held-out windows of 4 times the training length
    sample: int  # tokens of each sample
    call: int  # tokens per call while reading; writes are looked at once per call

    @property
    def length(self) -> int:
        """Training length, and the window of attention beyond it."""
        return self.hope.train.length


def full_settings(seed: int) -> Settings:
    """Minutes on two cores."""
    train = TrainConfig(
        steps=330,
        rows=8,
        length=256,
        stream_length=16_384,
        eval_every=33,
        eval_windows=32,
        checkpoint_every=110,
        seed=seed,
    )
    optim = OptimConfig(lr=4e-3, final_lr=0.02, warmup_steps=50)
    hope, transformer = choices({"depth": 2}, window=train.length)
    return Settings(
        hope=RunConfig(model=hope, optim=optim, train=train),
        transformer=RunConfig(model=transformer, optim=optim, train=train),
        read=65_536, next=2_048, windows=64, long_windows=16, sample=400, call=1_024,
    )  # fmt: skip


def quick_settings(seed: int) -> Settings:
    """Seconds: everything happens, nothing is learned well."""
    train = TrainConfig(
        steps=12, rows=4, length=64, stream_length=512, eval_every=4, eval_windows=4, checkpoint_every=0, seed=seed
    )
    optim = OptimConfig(lr=4e-3, final_lr=0.02, warmup_steps=4)
    small = {"dim": 32, "depth": 2, "chunk_size": 16}
    hope, transformer = choices(small, window=train.length, periods=(32.0, 128.0, float("inf")))
    return Settings(
        hope=RunConfig(model=hope, optim=optim, train=train),
        transformer=RunConfig(model=transformer, optim=optim, train=train),
        read=2_048, next=128, windows=4, long_windows=2, sample=24, call=128,
    )  # fmt: skip


def choices(sizes: dict[str, Any], *, window: int, **hope: Any) -> tuple[ModelChoice, ModelChoice]:
    """Hope with the parameters of a Transformer++, and that Transformer++."""
    transformer = ModelChoice(name="transformer", window=window, **sizes)
    return ModelChoice(name="hope", match="transformer", **sizes, **hope), transformer
