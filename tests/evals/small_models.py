"""Models and texts small enough for tests."""

import torch
from torch import Tensor

from nestling.models import LanguageModel, Output, State, build
from nestling.models.state import Carried

VOCAB = 40


def model(name: str = "hope-attention", **changes) -> LanguageModel:
    """An untrained model, two layers of 16, writing every 16 and 32 tokens; the outputs large enough to learn."""
    options = {"vocab_size": VOCAB, "dim": 16, "depth": 2, "heads": 2, "chunk_size": 8}
    if name != "transformer":
        options |= {"periods": (16, 32), "inner_lr": 0.05}
    torch.manual_seed(0)
    return build(name, **(options | changes)).double()


def text(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    """A text that repeats itself with small changes, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(VOCAB, (rows, 12), generator=generator)
    tokens = pattern.repeat(1, length // 12 + 1)[:, :length].clone()
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    return torch.where(noise, torch.randint(VOCAB, tokens.shape, generator=generator), tokens)


class Counter:
    """No network: predicts token t of a window with the log-probability -t / 100, and keeps no state."""

    def __call__(self, tokens: Tensor, state: State | None = None, learn: bool = True) -> Output:
        rows, length = tokens.shape
        wanted = torch.arange(1, length + 1) / 100
        logits = torch.full((rows, length, VOCAB), 0.0)
        # token 0 has probability exp(-t/100), the others share the rest
        rest = torch.log1p(-torch.exp(-wanted)) - torch.log(torch.tensor(VOCAB - 1.0))
        logits += rest[None, :, None]
        logits[:, :, 0] = -wanted
        return Output(logits, State(Carried([], {}, None, torch.full((rows,), length))))
