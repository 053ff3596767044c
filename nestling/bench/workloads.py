"""Layers and models as work to be timed: one call of a work is one forward, or one forward and backward, pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memories import SelfModifyingTitans
from nestling.models import LanguageModel, build

Work = Callable[[], object]
LAYERS = ("transformer block", "self-modifying", "self-modifying x2", "self-modifying mlp")


class TransformerBlock(nn.Module):
    """What everything is compared with: pre-norm attention by torch's own kernel and an MLP of four times the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def layer(name: str, dim: int, heads: int, chunk_size: int = 64) -> nn.Module:
    """A layer of `LAYERS`, the library's defaults where nothing else is said."""
    torch.manual_seed(0)
    if name == "transformer block":
        return TransformerBlock(dim, heads)
    options = {
        "self-modifying": {},
        "self-modifying x2": {"expansion": 2},
        "self-modifying mlp": {"memory": "mlp"},
    }[name]
    return SelfModifyingTitans(dim, heads, chunk_size=chunk_size, **options)  # type: ignore[arg-type]


def layer_work(module: nn.Module, x: Tensor, *, training: bool) -> Work:
    """Forward, or forward and backward to the input and all parameters."""
    inputs = x.detach().requires_grad_(training)
    slope = torch.randn_like(inputs)

    def forward() -> Tensor:
        y = module(inputs)
        return y if isinstance(y, Tensor) else y[0]

    def both() -> None:
        forward().backward(slope)
        module.zero_grad(set_to_none=True)
        inputs.grad = None

    def only() -> None:
        with torch.no_grad():
            forward()

    return both if training else only


def model(name: str, preset: str = "tiny", **overrides: object) -> LanguageModel:
    """A model of the library from seed 0, with the parameters of the Transformer of its size."""
    torch.manual_seed(0)
    match = {} if name == "transformer" else {"match": "transformer"}
    return build(name, preset, **(match | overrides))  # type: ignore[arg-type]


def training_work(module: LanguageModel, tokens: Tensor) -> Work:
    """One step: loss with writes on, backward, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with precision(tokens):
            loss, _ = module.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reading_work(module: LanguageModel, tokens: Tensor, *, learn: bool) -> Work:
    """One forward pass that keeps no graph."""

    def read() -> None:
        with torch.no_grad(), precision(tokens):
            module(tokens, learn=learn)

    return read


def text(rows: int, tokens: int, vocab_size: int, device: str = "cpu") -> Tensor:
    """Random tokens (rows, tokens): the arithmetic does not depend on them."""
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def precision(like: Tensor) -> AbstractContextManager[object]:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if like.is_cuda else nullcontext()
