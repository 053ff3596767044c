"""Packing: masked tokens are taken out before a model reads, so that they are nowhere: no position, no write."""

from __future__ import annotations

import torch
from torch import Tensor

from .reader import Text
from .segments import NONE, UNKNOWN


def pack(
    tokens: Tensor, targets: Tensor | None, mask: Tensor | None, new_document: Tensor | None, vocab_size: int
) -> tuple[Text, Tensor | None]:
    """Left-aligned text, and for every original position its packed column (-1 = masked), or None without a mask.

    Raises ValueError for wrong shapes, types or token ids.
    """
    _check(tokens, targets, mask, new_document, vocab_size)
    rows, length = tokens.shape
    if mask is None:
        lengths = torch.full((rows,), length, device=tokens.device)
        goal = _next(tokens, lengths, new_document) if targets is None else _given(targets)
        return Text(tokens, goal, lengths, new_document), None
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    lengths = mask.sum(1)
    packed = tokens.gather(1, order)
    borders = None if new_document is None else _packed_borders(new_document, mask, order)
    ends = None if new_document is None else _ends(new_document, mask)
    real = torch.arange(length, device=tokens.device) < lengths[:, None]
    if targets is None:
        goal = _next(packed, lengths, borders)
    else:
        goal = _given(targets).gather(1, order).masked_fill(~real, UNKNOWN)
    place = torch.where(mask, mask.cumsum(1) - 1, -1)
    return Text(packed, goal, lengths, borders, ends), place


def unpack(logits: Tensor, place: Tensor | None) -> Tensor:
    """Packed logits (B, T', V) back at the original positions; zero where the mask was False."""
    if place is None:
        return logits
    if logits.shape[1] == 0:
        return logits.new_zeros(*place.shape, logits.shape[-1])
    at = place.clamp_min(0).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    return logits.gather(1, at) * (place >= 0).unsqueeze(-1)


def _given(targets: Tensor) -> Tensor:
    """Targets of the caller; a negative one says that this position predicts nothing."""
    return targets.masked_fill(targets < 0, NONE)


def _next(tokens: Tensor, lengths: Tensor, borders: Tensor | None) -> Tensor:
    """The token that follows each, UNKNOWN at the end of the call and of a document."""
    goal = torch.full_like(tokens, UNKNOWN)
    goal[:, :-1] = tokens[:, 1:]
    if borders is not None:
        goal[:, :-1] = goal[:, :-1].masked_fill(borders[:, 1:], UNKNOWN)
    last = torch.arange(tokens.shape[1], device=tokens.device) >= (lengths - 1)[:, None]
    return goal.masked_fill(last, UNKNOWN)


def _packed_borders(new_document: Tensor, mask: Tensor, order: Tensor) -> Tensor:
    """A border at a masked token moves to the next token that is read."""
    document = new_document.cumsum(1).gather(1, order)
    before = torch.cat([torch.zeros_like(document[:, :1]), document[:, :-1]], 1)
    return document > before


def _ends(new_document: Tensor, mask: Tensor) -> Tensor:
    """(B,) True where a border stands behind the last token that is read."""
    behind = mask.flip(1).cumsum(1).flip(1) == 0
    return (new_document & behind).any(1)


def _check(
    tokens: Tensor, targets: Tensor | None, mask: Tensor | None, new_document: Tensor | None, vocab_size: int
) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.long:
        raise ValueError(f"tokens must be (B, T) int64, got {tuple(tokens.shape)} {tokens.dtype}; use tokens.long()")
    for name, other, dtype in (
        ("targets", targets, torch.long),
        ("mask", mask, torch.bool),
        ("new_document", new_document, torch.bool),
    ):
        if other is not None and (other.shape != tokens.shape or other.dtype != dtype):
            raise ValueError(f"{name} must be {tuple(tokens.shape)} {dtype}, got {tuple(other.shape)} {other.dtype}")
    for name, ids in (("tokens", tokens), ("targets", targets)):
        if ids is None or ids.numel() == 0:
            continue
        low, high = int(ids.min()), int(ids.max())
        if high >= vocab_size or (low < 0 and name == "tokens"):
            wrong = high if high >= vocab_size else low
            raise ValueError(
                f"{name}: id {wrong} is outside the vocabulary 0 .. {vocab_size - 1}; use the model's tokenizer"
            )
