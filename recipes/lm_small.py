"""Small byte models on the bundled Shakespeare: the same data, tokens, steps and parameters for every model.

nestling train recipes/lm_small.py:hope
nestling train recipes/lm_small.py:transformer --train.steps 1500
"""

from __future__ import annotations

from nestling.train import ModelChoice, OptimConfig, RunConfig, TrainConfig

PERIODS = (256.0, 1024.0, 4096.0)  # levels of the models that learn while they read
LENGTH = 256  # training length in bytes; also the attention window beyond it


def transformer(*, steps: int = 300, lr: float = 4e-3, seed: int = 0, depth: int = 2) -> RunConfig:
    """Transformer++."""
    return _run(ModelChoice(name="transformer", depth=depth), steps, lr, seed)


def hope(*, steps: int = 300, lr: float = 4e-3, seed: int = 0, depth: int = 2) -> RunConfig:
    """Hope with the parameters of the Transformer."""
    return _run(ModelChoice(name="hope", depth=depth, periods=PERIODS, match="transformer"), steps, lr, seed)


def hope_attention(*, steps: int = 300, lr: float = 4e-3, seed: int = 0, depth: int = 2) -> RunConfig:
    """Hope-Attention with the parameters of the Transformer."""
    model = ModelChoice(name="hope-attention", depth=depth, periods=PERIODS, match="transformer", window=LENGTH)
    return _run(model, steps, lr, seed)


def _run(model: ModelChoice, steps: int, lr: float, seed: int) -> RunConfig:
    return RunConfig(
        model=model,
        optim=OptimConfig(lr=lr, final_lr=0.02, warmup_steps=50, decay_steps=steps * 4 // 5),
        train=TrainConfig(
            steps=steps,
            length=LENGTH,
            stream_length=16 * 1024,
            eval_every=max(1, steps // 5),
            checkpoint_every=max(1, steps // 2),
            eval_windows=64,
            seed=seed,
        ),
    )
