"""The paper's sizes: half a million tokens a step, AdamW at 4e-4 with a cosine, decay 0.1.

nestling prepare hub:HuggingFaceFW/fineweb-edu:sample-100BT --out shards/web --tokenizer tokenizer.json --workers 16
nestling prepare held-out.jsonl --out shards/held-out --tokenizer tokenizer.json
nestling plan recipes/scale.py:size_760m --gpus 8
torchrun --nproc-per-node 8 --max-restarts 3 -m nestling train recipes/scale.py:size_760m --out runs/hope-760m

Every model by its name: --model.name hope, hope-attention, transformer, titans-lmm, gated-delta-net. The tokenizer has
32,000 pieces (`BPETokenizer.train`). The paper gives the tokens of the two larger sizes, not those of the smaller
ones, nor batch and rate, which are Titans'. Rows are few and long, since every row of a model that learns has weights
of its own: `nestling plan` counts them (docs/scale.md).
"""

from __future__ import annotations

from nestling.train import DataConfig, GuardConfig, ModelChoice, OptimConfig, ParallelConfig, RunConfig, TrainConfig

LENGTH, ROWS = 16_384, 32  # 524,288 tokens a step
BILLION = 10**9


def size_160m() -> RunConfig:
    """160M parameters, 8 billion tokens."""
    return _run("base", 8 * BILLION)


def size_340m() -> RunConfig:
    """340M parameters, 15 billion tokens."""
    return _run("340m", 15 * BILLION)


def size_760m() -> RunConfig:
    """760M parameters, 30 billion tokens: the smaller models of Table 2."""
    return _run("760m", 30 * BILLION)


def size_1300m() -> RunConfig:
    """1.3B parameters, 100 billion tokens: the larger models of Table 2."""
    return _run("1.3b", 100 * BILLION)


def _run(preset: str, tokens: int) -> RunConfig:
    steps = round(tokens / (ROWS * LENGTH))
    return RunConfig(
        model=ModelChoice(name="hope", preset=preset),
        data=DataConfig(
            text="shards/web", validation="shards/held-out", tokenizer="tokenizer.json", shuffle=1 << 20
        ),
        optim=OptimConfig(lr=4e-4, final_lr=0.1, warmup_steps=max(1, steps // 100), weight_decay=0.1),
        train=TrainConfig(
            steps=steps, rows=ROWS, length=LENGTH, stream_length=4 * LENGTH, device="cuda", bf16=True,
            eval_every=1000, eval_windows=64, calibrate_every=1000, checkpoint_every=500, keep=3, keep_every=10_000,
        ),
        parallel=ParallelConfig(accumulate=4, recompute=True),
        guard=GuardConfig(skips=3, rollbacks=2, spike=20.0),
    )  # fmt: skip
