"""A frozen model with examples in front of what it is asked: as many as fit, in equal parts from several sets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from .language import Text


def filled(sets: Sequence[Sequence[Tensor]], begin: int, room: int) -> Tensor:
    """(T,) `begin`, then texts of the sets in turn, their own first token left out, until no text of a turn fits."""
    parts, used = [torch.tensor([begin])], 1
    for turn in zip(*sets, strict=False):
        size = sum(len(text) - 1 for text in turn)
        if used + size > room:
            break
        parts += [text[1:] for text in turn]
        used += size
    return torch.cat(parts)


class Prompted:
    """Reads texts (ids, start), whose first token begins a text, behind a prompt.

    Args:
        model: the frozen model. prompt: (T,) what is in front. end: id that ends a translation. new: tokens at most.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, *, end: int, new: int) -> None:
        self.model, self.prompt, self.end, self.new = model, prompt, end, new
        self.name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def read(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """(n, V) log probabilities behind ids (n,)."""
        out = self.model(input_ids=ids[None], use_cache=True, **{self.name: cache})
        return out.logits[0].log_softmax(-1)

    @torch.no_grad()
    def ask(self, text: Text) -> tuple[float, list[int]]:
        """Nats of the tokens of a text from its start on, and what the model would have said in their place."""
        ids, start = text
        cache = DynamicCache(config=self.model.config)
        last = self.read(torch.cat([self.prompt, ids[1:start]]), cache)[-1]
        held = cache.get_seq_length()
        rest = torch.cat([last[None], self.read(ids[start:], cache)[:-1]])
        nats = -float(rest.gather(1, ids[start:, None]).sum())
        cache.crop(held - cache.get_seq_length())
        said: list[int] = []
        while len(said) < self.new:
            said.append(int(last.argmax()))
            if said[-1] == self.end:
                break
            last = self.read(torch.tensor(said[-1:]), cache)[-1]
        return nats, said
