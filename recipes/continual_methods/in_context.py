"""Classes from examples in the context of a frozen model, by the log probability of the class's name.

`in_context` shows as many labelled examples of the classes seen so far as fit. `inca` follows InCA (Momeni et al.
2025): one Gaussian per class over frozen features narrows the classes down to a few, and only those are shown. (The
paper's tags by a large model and its sentence encoder are left out: the features are those of the model itself.)
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

Encode = Callable[[str], Tensor]  # text -> ids (n,), without special tokens


@dataclass(frozen=True)
class Shown:
    """An example as text."""

    text: str
    label: int


class Prompter:
    """Asks a frozen model.

    Args:
        model: the model. encode: its tokenizer. begin: id of the token that begins a text. names: of the classes.
        room: tokens of a prompt at most.
    """

    def __init__(
        self, model: PreTrainedModel, encode: Encode, begin: int, names: Sequence[str], *, room: int = 480
    ) -> None:
        self.model, self.encode, self.begin, self.room = model, encode, torch.tensor([begin]), room
        self.names = [encode(f" {name}\n") for name in names]

    def in_context(self, query: str, pool: Sequence[Shown], seen: Sequence[int], seed: int) -> int:
        """The class of a query, among `seen`, after examples drawn from the pool."""
        return self.choose(query, random.Random(seed).sample(list(pool), min(len(pool), 64)), seen)

    def inca(self, query: str, pool: Sequence[Shown], candidates: Sequence[int], each: int, seed: int) -> int:
        """The class of a query, among candidates, after `each` examples of every one of them."""
        generator = random.Random(seed)
        shown = [
            example for label in candidates for example in generator.sample([e for e in pool if e.label == label], each)
        ]
        generator.shuffle(shown)
        return self.choose(query, shown, candidates)

    def choose(self, query: str, shown: Sequence[Shown], labels: Sequence[int]) -> int:
        """The label whose name is the most probable per token; of the examples the first that fit are shown."""
        asked = self.encode(f"{query} =")
        parts, used = [self.begin], 1 + len(asked)
        for example in shown:
            part = torch.cat([self.encode(f"{example.text} ="), self.names[example.label]])
            if used + len(part) > self.room:
                break
            parts.append(part)
            used += len(part)
        scores = name_scores(self.model, torch.cat([*parts, asked]), [self.names[label] for label in labels])
        return labels[int(scores.argmax())]


@torch.no_grad()
def name_scores(model: PreTrainedModel, prompt: Tensor, names: Sequence[Tensor]) -> Tensor:
    """(len(names),) mean log probability of the tokens of each name (n_i,) behind a prompt (T,)."""
    cache = DynamicCache(config=model.config)
    given = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    first = model(input_ids=prompt[None], use_cache=True, **{given: cache}).logits[0, -1].log_softmax(-1)
    cache.batch_repeat_interleave(len(names))
    rows = torch.nn.utils.rnn.pad_sequence(list(names), batch_first=True)  # (N, n)
    rest = model(input_ids=rows, use_cache=True, **{given: cache}).logits[:, :-1].log_softmax(-1)
    later = rest.gather(-1, rows[:, 1:, None])[..., 0]  # (N, n - 1)
    lengths = torch.tensor([len(name) for name in names])
    real = torch.arange(1, rows.shape[1]) < lengths[:, None]
    return (first[rows[:, 0]] + (later * real).sum(1)) / lengths
