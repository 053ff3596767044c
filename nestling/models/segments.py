"""Open segments: how tokens are added to them, and when a segment is known to its end."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.state import Tree, pad_right, replace, where_rows
from ..memories.continuum import Observation
from .state import Segment

UNKNOWN = -1  # the next token has not arrived
NONE = -2  # the caller says that there is no target here


def append(
    segment: Segment, tokens: Tensor, targets: Tensor, active: Tensor, ready: dict[str, Observation] | None
) -> Segment:
    """Add tokens (B, n) and targets to the segments of the active rows; `ready`: what they say as whole segments."""
    length, have, size = segment.length, segment.tokens.shape[1], tokens.shape[1]
    even = not bool((~active | (length != have)).any())
    return replace(
        segment,
        tokens=torch.cat([segment.tokens, tokens], 1) if even else _append_rows(segment.tokens, length, tokens, active),
        targets=torch.cat([segment.targets, targets], 1)
        if even
        else _append_rows(segment.targets, length, targets, active),
        length=length + active * size,
        ready=ready if ready is not None else segment.ready,
        is_ready=torch.ones_like(active) if ready is not None else segment.is_ready & ~active,
    )


def known_to_the_end(segment: Segment) -> Tensor:
    """(B,) whether the token behind the last one is known; False where there is none."""
    if segment.targets.shape[1] == 0:
        return torch.zeros_like(segment.sealed)
    last = segment.targets.gather(1, (segment.length - 1).clamp_min(0)[:, None]).squeeze(1)
    return last != UNKNOWN


def one_token(like: Tensor, contexts: int) -> Segment:
    """A segment of one token and its target, at the start of a text."""
    token = like.new_zeros(1, 1)
    no = torch.zeros(1, dtype=torch.bool, device=like.device)
    return Segment(token, token, like.new_ones(1), no, [None] * contexts, None, no)


def for_rows(rows: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` in the rows that are True, `old` elsewhere."""
    if bool(rows.all()):
        return new
    return old if not bool(rows.any()) else where_rows(rows, new, old)


def with_next_token(segment: Segment, rows: Tensor, token: Tensor) -> Segment:
    """In `rows`, the target of the last token read becomes known: it is the token that arrives."""
    if segment.targets.shape[1] == 0:
        return segment
    last = (segment.length - 1).clamp_min(0).unsqueeze(1)
    known = segment.targets.gather(1, last).squeeze(1)
    final = torch.where(rows & (known == UNKNOWN), token, known)
    return replace(segment, targets=segment.targets.scatter(1, last, final.unsqueeze(1)))


def _append_rows(have: Tensor, length: Tensor, new: Tensor, active: Tensor) -> Tensor:
    """Write `new` (B, n) behind the first `length` (B,) entries of `have` (B, m), in the active rows."""
    size = new.shape[1]
    wide = pad_right(have, max(have.shape[1], int((length + active * size).max())))
    wide = pad_right(wide, max(wide.shape[1], size))
    place = length[:, None] + torch.arange(size, device=new.device)
    at = place.clamp_max(wide.shape[1] - 1)
    written = wide.scatter(1, at, new)
    return torch.where(active[:, None], written, wide)
