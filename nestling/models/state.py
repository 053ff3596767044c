"""State: everything a model remembers of what its sequences have read; a value that goes in and comes out."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import state as trees
from ..core.state import Tree, state_class
from ..memories.continuum import FastState, Observation

if TYPE_CHECKING:
    from .reading_model import ReadingModel


@state_class
class Segment:
    """The open segment of each row: read, but not yet learned from.

    Attributes:
        tokens, targets: (B, n) its tokens and the token that follows each (-1 = not known, or none).
        length: (B,) tokens in it.
        sealed: (B,) True if what comes next does not continue it, so that it closes with the targets it has.
        mixers: the mixer states at its start.
        ready: what it says about each level, where that is known already, and for which rows (`is_ready`, (B,)).
    """

    tokens: Tensor
    targets: Tensor
    length: Tensor
    sealed: Tensor
    mixers: list[Tree]
    ready: dict[str, Observation] | None
    is_ready: Tensor


@state_class
class Carried:
    """The tree inside a State: mixer states by block, fast weights by level, the open segment, (B,) tokens read."""

    mixers: list[Tree]
    fast: FastState
    segment: Segment | None
    tokens: Tensor


class State:
    """What the sequences of a batch have left in a model. Immutable; rows are sequences.

    Rows never mix, and have their own clocks, so rows of different age stack. Save and load it with
    `nestling.save_state` and `nestling.load_state`.
    """

    def __init__(self, tree: Carried, model: ReadingModel | None = None, fingerprint: str | None = None) -> None:
        self.tree = tree
        self.fingerprint = fingerprint
        self._model = None if model is None else weakref.ref(model)

    @property
    def model(self) -> ReadingModel | None:
        """The model that made it, while that lives; None for a state from a file."""
        return None if self._model is None else self._model()

    def owner(self) -> str:
        """The fingerprint of the model that it belongs to."""
        if self.model is not None:
            return self.model.fingerprint()
        return self.fingerprint or "a model that no longer exists"

    def _with(self, tree: Carried) -> State:
        made = State(tree, fingerprint=self.fingerprint)
        made._model = self._model
        return made

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.tree.tokens)

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens each sequence has read."""
        return self.tree.tokens

    @property
    def writes(self) -> Tensor:
        """(B, L) writes of each CMS level of the last block that has them, fast to slow."""
        return _columns([s.writes for s in self._last_stack()], self.tree.tokens)

    @property
    def clocks(self) -> Tensor:
        """(B, L) tokens since the last write, the open segment included."""
        open_ = 0 if self.tree.segment is None else self.tree.segment.length
        return _columns([s.clock + open_ for s in self._last_stack()], self.tree.tokens)

    @property
    def write_norms(self) -> dict[str, Tensor]:
        """(B,) length of the last write of every level relative to its weights, by the level's path."""
        return {path: s.norm for path, s in self.tree.fast.items()}

    def _last_stack(self) -> list[Any]:
        """Levels side by side in a list stand fast to slow; a level inside another comes after it, and is faster."""
        stacks: dict[str, list[str]] = {}
        for path in self.tree.fast:
            outermost = re.sub(r"(\.body)+$", "", path)
            stacks.setdefault(outermost.rpartition(".")[0], []).append(path)
        last = next(reversed(stacks.values()), [])
        return [self.tree.fast[path] for path in sorted(last, key=lambda path: -path.count(".body"))]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return trees.nbytes(self.tree)

    def detach(self) -> State:
        """The same values without autograd history."""
        return self._with(trees.detach(self.tree))

    def to(self, device: torch.device | str) -> State:
        """The same values on another device."""
        return self._with(trees.to(self.tree, device))

    def select(self, rows: Sequence[int] | Tensor) -> State:
        """The sequences `rows`, in that order, as copies."""
        return self._with(trees.select_rows(self.tree, rows))

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """One state whose rows are those of all `states` in turn, whatever their ages."""
        if not states:
            raise ValueError("State.stack: the list is empty; give at least one state")
        owner = next((s for s in states if s.model is not None), states[0])
        for other in states:
            if other.model is not owner.model or other.fingerprint != owner.fingerprint:
                a, b = owner.owner(), other.owner()
                if a != b:
                    raise ValueError(f"State.stack: states of {a} and of {b}; only states of one model stack")
        return owner._with(trees.stack_rows([s.tree for s in states], [s.rows for s in states]))

    def reset_context(self) -> State:
        """The same fast weights, clocks and buffers with empty mixers and positions: what was learned, without what
        is still in context."""
        tree, segment = self.tree, self.tree.segment
        if segment is not None:
            segment = trees.replace(segment, sealed=segment.sealed | (segment.length > 0))
        return self._with(Carried([None] * len(tree.mixers), tree.fast, segment, tree.tokens))


def _columns(counts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(counts, 1) if counts else like.new_zeros(len(like), 0)
