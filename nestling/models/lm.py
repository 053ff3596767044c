"""LanguageModel: a stack of blocks of ours. Tokens and a state go in, logits and the next state come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.level import Level, Levels
from ..core.spread import Split
from .block import Block, continuum_of
from .config import ModelConfig
from .decoder import Decoder
from .learning_decoder import LearningDecoder
from .reading_model import ReadingModel
from .state import State


class LanguageModel(ReadingModel):
    """Embedding, blocks of (sequence memory, continuum memory), head.

    Args:
        config: its shape. mixer: makes the sequence memory of a block from the config.
    """

    def __init__(self, config: ModelConfig, mixer: Callable[[ModelConfig], nn.Module]) -> None:
        super().__init__()
        self.config: ModelConfig = config
        self.contexts = config.depth
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config.dim, mixer(config), continuum_of(config)) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights of variance 1/inputs; what a block adds to the stream is scaled by 1/sqrt(2 depth)."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, Block):
            scale = (2 * self.config.depth) ** -0.5
            for name, parameter in module.named_parameters():
                if name.endswith((".out.weight", ".project_out.weight", ".norm_out.weight", ".down.weight")):
                    with torch.no_grad():
                        parameter.mul_(scale)

    def body(self, tokens: Tensor, mixers: list[Any], lengths: Tensor | None = None) -> tuple[Tensor, list[Any]]:
        """Tokens (B, T) -> normed stream (B, T, D) and the mixer states, in the reading around it."""
        x, after = self.embedding(tokens), []
        for block, state in zip(self.blocks, mixers, strict=True):
            x, state = block(x, state, lengths)
            after.append(state)
        return self.norm(x), after

    def to_logits(self, hidden: Tensor) -> Tensor:
        """The head, on the normed stream."""
        return self.head(hidden)

    def decoder(self, state: State, *, room: int, learn: bool) -> Decoder | LearningDecoder:
        """What continues a state token by token, at constant cost."""
        return LearningDecoder(self, state, room=room) if learn else Decoder(self, state, room=room)

    def levels(self) -> Levels:
        """The boxes of this model, fast to slow; their state bytes together bound the state of one sequence."""
        made = [
            Level(**{**vars(box), "name": f"blocks.{i}: {box.name}"})
            for i, block in enumerate(self.blocks)
            for box in block.levels()  # type: ignore[operator]
        ]
        return Levels(made)

    def splits(self, parts: int) -> dict[str, Split]:
        """How the matrices of this model may be split among ranks, by the names of their modules.

        Embedding and head are, if the vocabulary divides. Raises ValueError for heads or hidden units that do not.
        """
        if self.config.bptt:
            raise ValueError(f"bptt={self.config.bptt} differentiates a write, whose lengths ranks share; use bptt=0")
        ends = {"embedding": Split(0), "head": Split(0, stays=True)} if self.config.vocab_size % parts == 0 else {}
        blocks = [block.splits(parts) for block in self.blocks]  # type: ignore[operator]
        return ends | {f"blocks.{i}.{name}": split for i, found in enumerate(blocks) for name, split in found.items()}

    def num_parameters(self) -> int:
        """All slow parameters, embedding and head included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context: int = 0, *, training: bool = False) -> float:
        """Multiply-adds times two per token: matrices once, attention over `context` cached tokens; training = 3 x."""
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() >= 2 and "embedding" not in n)
        keys = sum(block.keys_per_query(context) for block in self.blocks)  # type: ignore[operator]
        scores = 2 * keys * self.config.dim
        return 2.0 * (matrices + scores) * (3 if training else 1)
