"""Reader: one call of a model over a stretch of text, segment by segment (docs/levels.md, "How a level learns").

The text is cut where any row's segment ends: where a CMS level's period is full, at a document border, at the end.
Inside a piece all weights are constant, so a piece is one parallel forward pass. A segment closes when the token
after it arrives; what it says about the levels comes from the activations of its own pass if these are still there,
and from reading it again if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.spread import whole
from ..core.state import Tree, detach, put_rows, replace, select_rows, tensors
from ..memories.continuum import (
    FastState,
    Observation,
    Reading,
    absorb,
    continuum_levels,
    current,
    initial_state,
    observe,
    reading,
    tokens_to_write,
)
from .replay import replayed
from .segments import UNKNOWN, append, for_rows, known_to_the_end, one_token, with_next_token
from .state import Carried, Segment

if TYPE_CHECKING:
    from .reading_model import ReadingModel

GRAPH_TOKENS = 4096  # of one call that keep their graph with outer="sequence"; more are read again for the gradient


@dataclass(frozen=True)
class Text:
    """Left-aligned tokens of one call.

    Attributes:
        tokens, targets: (B, T); a target is UNKNOWN or NONE where there is none.
        lengths: (B,) real tokens per row.
        borders: (B, T) True at the first token of a document, or None.
        ends: (B,) True where a document starts at a masked token behind the last one, or None.
    """

    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    borders: Tensor | None
    ends: Tensor | None = None


class Reader:
    """Carries a state through a text. Collects logits, or the loss and (first-order, segment-wise) its gradients.

    Args:
        model: a ReadingModel. learn: whether CMS levels observe and write.
        logits: keep the logits. score: keep the loss.
        parameters: gradients of the loss w.r.t. these are taken piece by piece as soon as nothing later can depend
            on a piece ("immediate"); empty = the loss keeps its graph.
    """

    def __init__(
        self,
        model: ReadingModel,
        text: Text,
        *,
        learn: bool,
        logits: bool,
        score: bool,
        parameters: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.text, self.learn, self.company = model, text, learn, model.company
        self.levels = continuum_levels(model)
        self.learning = learn and bool(self.levels)
        self.static = all(level.rule.static for level in self.levels.values())  # clocks tick, nothing is learned
        self.outer = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        self.exact = self.outer and model.config.bptt > 0
        self.cut = not self.outer or model.config.outer == "segment"
        self.want_logits, self.want_score = logits, score
        through = self.outer and score and not logits and not self.cut and not self.exact
        self.replays = through and text.tokens.numel() > GRAPH_TOKENS
        self.parameters = list(parameters)
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.logits: list[Tensor] = []
        self.loss: Tensor | None = None  # with graph, unless immediate
        self.value = torch.zeros((), dtype=torch.float64, device=text.tokens.device)
        self.attached = False  # the mixers carry a graph of this call

    def run(self, carried: Carried | None) -> Carried:
        """Read the whole text; the state after it."""
        rows, length = self.text.tokens.shape
        device = self.text.tokens.device
        if carried is None:
            none_read = torch.zeros(rows, dtype=torch.long, device=device)
            fast = initial_state(self.levels, rows, device)
            carried = Carried([None] * self.model.contexts, fast, None, none_read)
        column, end = 0, int(self.text.lengths.max()) if rows else 0
        while column < end:
            carried = self._settle(carried, column)
            size = self._piece(carried, column)
            carried = self._advance(carried, column, size)
            column += size
        if self.text.ends is not None and bool(self.text.ends.any()):
            carried = self._start_documents(carried, self.text.ends)
        self._flush()
        assert column <= length
        return detach(self._observed(carried))

    # --- closing segments -------------------------------------------------------------------------------------

    def _settle(self, carried: Carried, column: int) -> Carried:
        """Before the token at `column` is read: close the segments that end here, start documents afresh."""
        arrives = column < self.text.lengths
        border = arrives & self.text.borders[:, column] if self.text.borders is not None else None
        segment = carried.segment
        if self.learning and segment is not None:
            filled = arrives & (segment.length > 0)
            continues = filled & ~segment.sealed if border is None else filled & ~segment.sealed & ~border
            segment = with_next_token(segment, continues, self.text.tokens[:, column])
            carried = replace(carried, segment=segment)
            ends = filled & ~(continues & (segment.length < _waits(self.levels, carried.fast)))
            carried = self._end(carried, ends)
        if border is not None and bool(border.any()):
            carried = self._new_document(carried, border)
        return carried

    def _start_documents(self, carried: Carried, border: Tensor) -> Carried:
        """A border whose first real token is still to come."""
        if self.learning and carried.segment is not None:
            carried = self._end(carried, border & (carried.segment.length > 0))
        return self._new_document(carried, border)

    def _end(self, carried: Carried, ends: Tensor) -> Carried:
        """Close the segments of the rows that are True, and read again in company those that have to be."""
        assert carried.segment is not None
        mine = bool(ends.any()), bool((ends & ~carried.segment.is_ready).any()) and not self.static
        ending, again, going_on = self.company.any(*mine, not bool(ends.all()))
        if not ending:
            return carried
        if self.cut:
            carried = replace(carried, mixers=for_rows(ends, detach(carried.mixers), carried.mixers))
            self.attached = self.attached and going_on
        carried = self._close(carried, ends) if mine[0] else carried
        if again and not mine[1]:
            self._keep_company()
        return carried

    def _close(self, carried: Carried, ends: Tensor) -> Carried:
        segment, every = carried.segment, bool(ends.all())
        assert segment is not None
        known = ends & segment.is_ready
        if bool(known.any()) and bool((known != ends).any()):  # no row is read again because another one has to be
            return self._close(self._close(carried, known), ends & ~known)
        if every:
            fast = self._learn_from(segment, carried.fast)
            zero, nothing = torch.zeros_like(segment.length), segment.tokens[:, :0]
            no = torch.zeros_like(segment.sealed)
            if self.exact and not any(x.requires_grad for x in tensors(fast)):  # what comes needs no graph of before
                self._flush()
            return replace(carried, fast=fast, segment=Segment(nothing, nothing, zero, no, segment.mixers, None, no))
        index = ends.nonzero().squeeze(1)
        part, below = select_rows(segment, index), select_rows(carried.fast, index)
        fast = put_rows(carried.fast, index, self._learn_from(part, below), len(ends))
        rest = replace(
            segment,
            length=segment.length.masked_fill(ends, 0),
            sealed=segment.sealed & ~ends,
            is_ready=segment.is_ready & ~ends,
        )
        return replace(carried, fast=fast, segment=rest)

    def _learn_from(self, segment: Segment, fast: FastState) -> FastState:
        """Observe closed segments, from their own pass or by reading them again, and write."""
        seen = segment.ready if bool(segment.is_ready.all()) else None
        if seen is None:
            with torch.enable_grad():
                seen = self._read_again(segment, fast)
        after = absorb(self.levels, fast, seen, segment.length, exact=self.exact)
        return self._truncated(fast, after) if self.exact else after

    def _observed(self, carried: Carried) -> Carried:
        """At the end of a training call: whole segments that were read in several pieces, because another row's ended
        in between, say what they say with these weights, as those that were read at once have done already."""
        segment = carried.segment
        if not (self.learning and self.outer) or self.exact or segment is None:
            return carried
        whole = (segment.length >= _waits(self.levels, carried.fast)) & ~segment.is_ready & known_to_the_end(segment)
        mine = bool(whole.any())
        [again] = self.company.any(mine and not self.static)
        if not mine:
            if again:
                self._keep_company()
            return carried
        index = whole.nonzero().squeeze(1)
        with torch.enable_grad():
            seen = detach(self._read_again(select_rows(segment, index), select_rows(carried.fast, index)))
        ready = put_rows(segment.ready, index, seen, len(whole))
        return replace(carried, segment=replace(segment, ready=ready, is_ready=segment.is_ready | whole))

    def _truncated(self, before: FastState, after: FastState) -> FastState:
        """Cut the graph of a level's fast weights at every (bptt + 1)-th of its writes."""
        block = self.model.config.bptt + 1
        return {
            path: for_rows((s.writes > before[path].writes) & (s.writes % block == 0), detach(s), s)
            for path, s in after.items()
        }

    def _keep_company(self) -> None:
        """Take part in a pass in which only other processes have segments to read again: with one token."""
        one = one_token(self.text.tokens, self.model.contexts)
        with torch.enable_grad():
            self._read_again(one, initial_state(self.levels, 1, one.tokens.device))

    def _read_again(self, segment: Segment, fast: FastState) -> dict[str, Observation]:
        length = int(segment.length.max())
        if self.static:
            return {path: Observation({}, {}, {}, (segment.targets >= 0).sum(1)) for path in self.levels}
        beyond = torch.arange(length, device=segment.length.device) >= segment.length[:, None]
        targets = segment.targets[:, :length].masked_fill(beyond, UNKNOWN)
        lengths = segment.length if bool(beyond.any()) else None
        before = fast if self.exact else detach(fast)
        with reading(current(self.levels, before, record=True, exact=self.exact)) as now, self._kernels():
            hidden, _ = self.model.body(segment.tokens[:, :length], segment.mixers, lengths)
        loss = self.model.token_loss(hidden, targets)
        valid = None if lengths is None else ~beyond
        counts = (targets >= 0).sum(1)
        return observe(self.levels, now, loss, targets=counts, valid=valid, exact=self.exact)[0]

    def _kernels(self) -> AbstractContextManager[None]:
        """Exact outer gradients differentiate twice; of the attention kernels only the plain one can."""
        return sdpa_kernel(SDPBackend.MATH) if self.exact else nullcontext()

    def _new_document(self, carried: Carried, border: Tensor) -> Carried:
        """Empty contexts in the rows where a document starts; levels with that policy go back to their start."""
        mixers = for_rows(border, [None] * len(carried.mixers), carried.mixers)
        fast = dict(carried.fast)
        for path, level in self.levels.items() if self.learning else ():
            if level.rule.reset == "document":
                fast[path] = level.forget(fast[path], border)
        segment = carried.segment
        if segment is not None and not self.learning:
            segment = replace(segment, sealed=segment.sealed | (border & (segment.length > 0)))
        return replace(carried, mixers=mixers, fast=fast, segment=segment)

    # --- reading ----------------------------------------------------------------------------------------------

    def _piece(self, carried: Carried, column: int) -> int:
        """Tokens until any row's segment ends."""
        left = self.text.lengths - column
        if self.learning:
            open_ = 0 if carried.segment is None else carried.segment.length
            left = torch.minimum(left, torch.where(left > 0, _waits(self.levels, carried.fast) - open_, left))
        if self.text.borders is not None and column + 1 < self.text.borders.shape[1]:
            ahead = self.text.borders[:, column + 1 :]
            first = torch.where(ahead.any(1), ahead.to(torch.uint8).argmax(1) + 1, left)
            left = torch.minimum(left, first)
        return self.company.least(int(left[self.text.lengths > column].min()))

    def _advance(self, carried: Carried, column: int, size: int) -> Carried:
        """Read one piece."""
        active = column < self.text.lengths
        everyone = bool(active.all())
        lengths = None if everyone else active * size
        tokens = self.text.tokens[:, column : column + size]
        targets = self.text.targets[:, column : column + size]
        if not everyone:
            targets = targets.masked_fill(~active[:, None], UNKNOWN)
        segment = self._opened(carried, active) if self.learning else carried.segment
        wanted = self.outer or not self.static
        record = (
            self.learning
            and wanted
            and not self.company.any(not (everyone and self._whole(segment, carried.fast, size, targets)))[0]
        )
        if self.replays:
            mixers, ready = self._read_for_later(carried, tokens, targets, lengths, record)
        else:
            mixers, ready = self._read_now(carried, tokens, targets, lengths, record)
        if record and self.cut:  # every row's segment ends here
            mixers, self.attached = detach(mixers), False
        else:
            self.attached = self.attached or self.outer
        if self.learning and segment is not None:
            segment = append(segment, tokens, targets, active, ready)
        elif segment is not None:
            segment = replace(segment, sealed=segment.sealed | (active & (segment.length > 0)))
        return Carried(mixers, carried.fast, segment, carried.tokens + active * size)

    def _read_now(
        self, carried: Carried, tokens: Tensor, targets: Tensor, lengths: Tensor | None, record: bool
    ) -> tuple[list[Tree], dict[str, Observation] | None]:
        """One pass, whose graph serves both gradients; the mixers after it, and what it says if it is recorded."""
        now = current(self.levels, carried.fast, record=record, exact=self.exact)
        with torch.set_grad_enabled(self.outer or record), reading(now), self._kernels():
            hidden, mixers = self.model.body(tokens, carried.mixers, lengths)
            loss = self._score(hidden, targets, needed=record)
        if record:
            return mixers, self._from_own_pass(now, loss, targets)
        if self.want_score and self.outer:
            self.loss = loss if self.loss is None else self.loss + loss
        return mixers, None

    def _read_for_later(
        self, carried: Carried, tokens: Tensor, targets: Tensor, lengths: Tensor | None, record: bool
    ) -> tuple[list[Tree], dict[str, Observation] | None]:
        """The same in constant memory: one pass now for the levels, one in the backward pass for the parameters."""
        seen: dict[str, Observation] = {}

        def read(mixers: list[Tree], record: bool) -> tuple[Tensor, list[Tree]]:
            with reading(current(self.levels, carried.fast, record=record)) as now:
                hidden, mixers = self.model.body(tokens, mixers, lengths)
                loss = self.model.token_loss(hidden, targets)
            if record:
                seen.update(observe(self.levels, now, loss, targets=(targets >= 0).sum(1))[0])
            return loss, mixers

        def first(mixers: list[Tree]) -> tuple[Tensor, list[Tree]]:
            with torch.set_grad_enabled(record):
                return read(mixers, record)

        wanted = [p for p in self.model.parameters() if p.requires_grad]
        loss, mixers = replayed(first, lambda mixers: read(mixers, False), carried.mixers, wanted)
        self.value += loss.detach()
        self.loss = loss if self.loss is None else self.loss + loss
        return mixers, seen if record else None

    def _opened(self, carried: Carried, active: Tensor) -> Segment:
        """The open segment; where it is empty it starts here, with the mixers as they are."""
        segment = carried.segment
        if segment is None:
            zero = torch.zeros_like(carried.tokens)
            nothing = self.text.tokens[:, :0]
            no = torch.zeros_like(active)
            return Segment(nothing, nothing, zero, no, self._constant(carried.mixers), None, no)
        starts = active & (segment.length == 0)
        return replace(segment, mixers=for_rows(starts, self._constant(carried.mixers), segment.mixers))

    def _constant(self, mixers: list[Tree]) -> list[Tree]:
        """The mixers at the start of a segment, from which it may be read again."""
        return mixers if self.exact and not self.cut else detach(mixers)

    def _whole(self, segment: Segment | None, fast: FastState, size: int, targets: Tensor) -> bool:
        """Whether this piece is a whole segment of every row, with all its targets known."""
        assert segment is not None
        full = (_waits(self.levels, fast) == size).all()
        return bool((segment.length == 0).all() & full & (targets[:, -1] != UNKNOWN).all())

    def _score(self, hidden: Tensor, targets: Tensor, *, needed: bool) -> Tensor:
        """Sum of the token losses; the logits are kept on the way if they are wanted."""
        if self.want_logits:
            logits = self.model.to_logits(hidden)
            self.logits.append(whole(logits if self.outer else logits.detach()))
            if not (needed or self.want_score):
                return hidden.new_zeros(())
            loss = self.model.loss_of_logits(logits, targets)
        else:
            loss = self.model.token_loss(hidden, targets)
        self.value += loss.detach()
        return loss

    def _from_own_pass(self, now: Reading, loss: Tensor, targets: Tensor) -> dict[str, Observation]:
        """Observations of a whole segment from the activations at hand, and its outer gradient with them."""
        immediate = bool(self.parameters) and self.cut and not self.exact and not self.attached
        ready, grads = observe(
            self.levels,
            now,
            loss,
            targets=(targets >= 0).sum(1),
            also=self.parameters if immediate and self.company.share is None else (),
            retain=self.outer and not immediate,
            exact=self.exact,
            share=self.company.share if immediate else None,
        )
        if immediate:
            self._collect(grads)
        elif self.outer and self.want_score:
            self.loss = loss if self.loss is None else self.loss + loss
        return ready

    def _collect(self, grads: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(grads):
            if g is not None:
                mine = self.gradients[i]
                self.gradients[i] = g if mine is None else mine.add_(g)

    def _flush(self) -> None:
        """Take the gradients of what is left in the graph."""
        if self.parameters and self.loss is not None:
            with torch.autocast(self.loss.device.type, enabled=False):  # the precision of the forward pass is kept
                if self.company.share is None:
                    self._collect(torch.autograd.grad(self.loss, self.parameters, allow_unused=True))
                else:
                    torch.autograd.backward(self.loss, torch.full_like(self.loss, self.company.share))
            self.loss = None


def _waits(levels, fast: FastState) -> Tensor:  # type: ignore[no-untyped-def]
    waits = tokens_to_write(levels, fast)
    assert waits is not None
    return waits
