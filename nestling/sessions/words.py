"""Words: the tokenizer of a session, ours or one of transformers, for texts that come in pieces."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 65_536  # characters that are encoded at once


class Words:
    """Text to ids and back.

    Args:
        tokenizer: anything with `encode(text)` and `decode(ids)`; special tokens (a begin-of-text id) are only asked
            for at a session's start, if `encode` has an option for them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_special = "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
        self.eos: int | None = getattr(tokenizer, "eos_token_id", None)
        self.template: bool = getattr(tokenizer, "chat_template", None) is not None

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they give the same ids, as far as they can tell."""
        own = getattr(self.tokenizer, "fingerprint", None)
        if own is not None:
            return str(own)
        pieces = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return "vocabulary-" + hashlib.sha256(pieces.encode()).hexdigest()[:16]

    def encode(self, text: str | Tensor | Sequence[int], *, first: bool) -> Tensor:
        """Ids (n,) of a text, or of ids; `first` = nothing was read before it."""
        if not isinstance(text, str):
            return torch.as_tensor(text, dtype=torch.long).flatten()
        options = {"add_special_tokens": first} if self.has_special else {}
        return torch.as_tensor(self.tokenizer.encode(text, **options), dtype=torch.long)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def stream(self, text: str | Iterable[str], *, first: bool) -> Iterator[tuple[Tensor, int]]:
        """The ids of a text of any length, block by block, cut before spaces and line ends; and their characters."""
        for piece in blocks(text):
            ids = self.encode(piece, first=first)
            first = first and len(ids) == 0
            yield ids, len(piece)

    def turn(self, message: str, *, first: bool) -> Tensor:
        """A message of a conversation, up to where the answer starts: by the tokenizer's template, or in plain text."""
        if not self.template:
            return self.encode(f"{'' if first else chr(10)}User: {message}\nAssistant:", first=first)
        turns = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        begin = getattr(self.tokenizer, "bos_token", None) or ""
        return self.encode(text if first else text.removeprefix(begin), first=False)


def blocks(text: str | Iterable[str]) -> Iterator[str]:
    """Pieces of at most `BLOCK` characters."""
    for part in (text,) if isinstance(text, str) else text:
        start = 0
        while len(part) - start > BLOCK:
            end = max(part.rfind(mark, start + 1, start + BLOCK) for mark in (" ", "\n"))
            end = end if end > start else start + BLOCK
            yield part[start:end]
            start = end
        if start < len(part):
            yield part[start:]
