"""Texts to classes on top of a causal language model, the same for every method.

Features of a text are the mean over its tokens of every layer's output, all layers side by side, standardised by what
the model's own sampled text looks like (so no task's data are needed). A linear map of them scores the classes; those
that were never seen are left out. An example is (ids, label).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memories.continuum import FastLinear

from .memory_head import MemoryHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARPNESS = 10.0  # logits per unit of what a memory head reads
PIECE = 16  # tokens of the pieces of own text that features are standardised by


class Classifier(nn.Module):
    """A backbone, and a head that is trained (`memory` None) or is a memory.

    Args:
        model: a causal language model of transformers, whose decoder is `model.model`.
        own_text: (B, T) text of the model itself. classes: how many there will be.
    """

    def __init__(self, model: PreTrainedModel, own_text: Tensor, classes: int, memory: MemoryHead | None) -> None:
        super().__init__()
        self.backbone = model.get_decoder()
        self.memory = memory
        width = model.config.num_hidden_layers * model.config.hidden_size
        self.mean, self.deviation = torch.zeros(width), torch.ones(width)
        head = FastLinear(width, classes, metric=False)
        nn.init.zeros_(head.weight)
        self.head: Any = head  # a recipe may put a level around it
        self.seen = torch.zeros(classes, dtype=torch.bool)
        with torch.no_grad():
            pieces = self.features(list(own_text[:, 1 : 1 + own_text.shape[1] // PIECE * PIECE].reshape(-1, PIECE)))
            self.mean, self.deviation = pieces.mean(0), pieces.std(0)

    def features(self, texts: Sequence[Tensor]) -> Tensor:
        """(n, layers x width) of texts (n_i,)."""
        lengths = torch.tensor([len(text) for text in texts])
        tokens = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)  # (n, T), padding behind and never looked at
        out = self.backbone(input_ids=tokens, output_hidden_states=True, use_cache=False)
        hidden = torch.cat(out.hidden_states[1:], -1)  # (n, T, F)
        real = (torch.arange(tokens.shape[1]) < lengths[:, None])[..., None]
        pooled = (hidden * real).sum(1) / lengths[:, None]
        return (pooled - self.mean) / self.deviation

    def logits(self, features: Tensor) -> Tensor:
        """(n, classes); -inf for classes never seen."""
        made = self.head(features[None])[0] if self.memory is None else SHARPNESS * self.memory.read(features)
        return made.masked_fill(~self.seen, -torch.inf)

    def expect(self, examples: Sequence[tuple[Tensor, int]]) -> None:
        """The classes of these examples exist from now on."""
        self.seen[labels_of(examples)] = True

    @torch.no_grad()
    def store(self, examples: Sequence[tuple[Tensor, int]]) -> None:
        """Write examples, as the model sees them now, into the memory; their classes exist from now on."""
        assert self.memory is not None
        self.memory.write(self.features([text for text, _ in examples]), labels_of(examples))
        self.expect(examples)

    def loss(self, examples: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Mean cross-entropy in nats; an example of a class that does not exist yet counts as zero.

        A memory is read before these examples are in it: what is learned is what finds the class of new examples.
        """
        labels = labels_of(examples)
        known = self.seen[labels]
        features = self.features([text for text, _ in examples])
        if not known.any():
            return 0 * (features.sum() + self.head.weight.sum())
        return F.cross_entropy(self.logits(features)[known], labels[known], reduction="sum") / len(examples)

    @torch.no_grad()
    def correct(self, examples: Sequence[tuple[Tensor, int]], batch: int = 100) -> list[bool]:
        """Whether each example's class is found. Read sorted by length, which saves padding."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
        made = [False] * len(examples)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            found = self.logits(self.features([examples[i][0] for i in part])).argmax(-1).tolist()
            for i, label in zip(part, found, strict=True):
                made[i] = label == examples[i][1]
        return made


def labels_of(examples: Sequence[tuple[Tensor, int]]) -> Tensor:
    """(n,)"""
    return torch.tensor([label for _, label in examples])
