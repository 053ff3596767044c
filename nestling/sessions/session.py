"""Session: one reader of one model, with a memory of its own that can be kept, copied, looked at and taken back.

session = nestling.Session(model, tokenizer)
session.read(open("book.txt").read())
print(session.generate("The captain", 40), session.report())
session.save("memory.safetensors")
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.state import replace
from ..memories.continuum import continuum_levels, tokens_to_write
from ..models import ReadingModel, State, read_tree, write_tree
from ..models.state import Carried
from .progress import ReadingLine
from .report import Event, Report, report_of
from .words import Words

_FORMAT = "nestling-session-1"
CALL = 1024  # tokens per call, rounded to whole segments: what a reading holds at once besides its memory
STOP = "\nUser:"  # where an answer ends that has no token for it


class Reads(Protocol):
    """A Hugging Face model of this library: converted, or NestlingForCausalLM."""

    reader: ReadingModel


@dataclass(frozen=True)
class Snapshot:
    """Where `undo` can go back to: the state before `name` happened, and how many events there were."""

    name: str
    state: State | None
    events: int
    kept: bool


class Session:
    """A memory of its own for one reader of a model. The model itself never changes, so sessions cannot mix.

    Args:
        model: a model of `nestling.models`, or of `nestling.hf`.
        tokenizer: of this library, of transformers, or anything with `encode` and `decode`.
        keep: how many states `undo` can go back to, besides those named by `snapshot`; each may be as
            large as the memory.
    """

    def __init__(self, model: ReadingModel | Reads, tokenizer: Any, *, keep: int = 4) -> None:
        self.model: ReadingModel = model if isinstance(model, ReadingModel) else model.reader
        self.words, self.keep = Words(tokenizer), keep
        self.id = secrets.token_hex(8)
        self.state: State | None = None
        self.events: tuple[Event, ...] = ()
        self.snapshots: tuple[Snapshot, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens read and said so far."""
        return 0 if self.state is None else int(self.state.tokens[0])

    # --- reading ----------------------------------------------------------------------------------------------

    def read(self, text: str | Iterable[str], *, learn: bool = True, progress: bool | None = None) -> Event:
        """Read a text of any length, and learn from it. Memory stays bounded: only `CALL` tokens are held at once.

        Args:
            text: a string, or an iterable of strings (an open file), which is read as it comes.
            learn: False = only look at it. progress: show a bar; None = where stderr is a terminal.
        Returns what happened, with the mean surprise per token. Raises ValueError if there is nothing to read.
        """
        line = ReadingLine(progress, len(text) if isinstance(text, str) else None)
        state, total, predicted, nats = self.state, 0, 0, 0.0
        for ids, after in self._calls(self._encoded(text, line)):
            count = len(ids) - (after is None)
            if count:
                targets = None if after is None else torch.cat([ids[1:], after])[None]
                with torch.no_grad():
                    mean, state = self.model.loss(ids[None], targets, state=state, learn=learn)
                nats += float(mean) * count
            else:
                state = self._forward(ids, state, learn)
            total, predicted = total + len(ids), predicted + count
            line.update(total, nats / predicted if predicted else None, state.nbytes)
        if total == 0:
            raise ValueError("read: the text is empty; give at least one token")
        line.close()
        event = Event(what="read", tokens=total, learn=learn, nats=nats / predicted if predicted else None)
        self._become(state, event)
        return event

    def _encoded(self, text: str | Iterable[str], line: ReadingLine) -> Iterator[Tensor]:
        for ids, characters in self.words.stream(text, first=self.tokens == 0):
            line.encoded(characters, len(ids))
            yield ids

    def _forward(self, ids: Tensor, state: State | None, learn: bool) -> State:
        with torch.no_grad():
            return self.model(ids[None], state, learn=learn).state

    def _calls(self, pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The ids in calls of whole segments, each with the token that follows it (None at the end)."""
        device = next(self.model.parameters()).device
        period = min([int(level.period) for level in continuum_levels(self.model).values()], default=CALL)
        size, waiting = max(1, CALL // period) * period if period <= CALL else CALL, torch.zeros(0, dtype=torch.long)
        first = size if self.state is None else self._until_write(size)
        for piece in pieces:
            waiting = torch.cat([waiting, piece.cpu()])
            while len(waiting) > first:
                yield waiting[:first].to(device), waiting[first : first + 1].to(device)
                waiting, first = waiting[first:], size
        if len(waiting):
            yield waiting.to(device), None

    def _until_write(self, size: int) -> int:
        """Tokens until the open segment is full, so that all later ones lie whole in a call."""
        assert self.state is not None
        tree = self.state.tree
        wait = tokens_to_write(continuum_levels(self.model), tree.fast)
        left = size if wait is None else int(wait[0]) - (0 if tree.segment is None else int(tree.segment.length[0]))
        return left if 0 < left <= size else size

    # --- talking ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        learn_prompt: bool = True,
        learn_output: bool = False,
        **how: Any,
    ) -> str:
        """Read a prompt, text or only the new ids, and go on with it; returns the new text.

        `how`: temperature, top_k, top_p, eos, generator. What the model says itself is read, but not learned unless
        `learn_output`.
        """
        ids = self.words.encode(prompt, first=self.tokens == 0)
        return self._say("generate", ids, max_new_tokens, None, learn_prompt, learn_output, how)

    def chat(self, message: str, max_new_tokens: int = 256, *, learn: bool = True, **how: Any) -> str:
        """One turn of a conversation; returns the answer. Messages are learned, answers are not.

        The tokenizer's chat template is used where there is one, else `User: ... Assistant: ...`.
        """
        ids = self.words.turn(message, first=self.tokens == 0)
        stop = None if self.words.template else STOP
        return self._say("chat", ids, max_new_tokens, stop, learn, False, how).strip()

    def _say(
        self, what: str, ids: Tensor, count: int, stop: str | None, learn: bool, learn_output: bool, how: dict[str, Any]
    ) -> str:
        if len(ids) == 0:
            raise ValueError(f"{what}: the prompt is empty; give at least one token")
        ids = ids.to(next(self.model.parameters()).device)
        how = {"eos": self.words.eos} | how
        made = self.model.generate(ids[None], count, self.state, learn_prompt=learn, learn_output=learn_output, **how)
        said: list[int] = []
        for token in made:
            said.append(int(token[0]))
            if stop is not None and stop in self.words.decode(said):
                break
        text = self.words.decode(said[:-1] if said and said[-1] == how["eos"] else said)
        self._become(made.state, Event(what=what, tokens=len(ids) + len(said), learn=learn))
        return text if stop is None else text.partition(stop)[0]

    # --- keeping ----------------------------------------------------------------------------------------------

    def _become(self, state: State | None, event: Event) -> None:
        """Take a new state, and keep the old one for `undo`."""
        self._remember(event.what, kept=False)
        self.state, self.events = state, (*self.events, event)

    def _remember(self, name: str, *, kept: bool) -> None:
        snapshots = [*self.snapshots, Snapshot(name, self.state, len(self.events), kept)]
        automatic = [i for i, s in enumerate(snapshots) if not s.kept]
        dropped = automatic[: max(0, len(automatic) - self.keep)]
        self.snapshots = tuple(s for i, s in enumerate(snapshots) if i not in dropped)

    def snapshot(self, name: str) -> None:
        """Name the state as it is now, so that `undo(name)` can come back to it, however much happens until then."""
        if any(s.kept and s.name == name for s in self.snapshots):
            raise ValueError(f"snapshot {name!r} exists already; choose another name")
        self._remember(name, kept=True)

    def undo(self, name: str | None = None) -> None:
        """Take back the last thing that happened, or all since the snapshot `name`.

        Raises ValueError if there is none.
        """
        fitting = [
            i for i, s in enumerate(self.snapshots) if (not s.kept if name is None else s.kept and s.name == name)
        ]
        if not fitting:
            names = ", ".join(s.name for s in self.snapshots if s.kept) or "none"
            what = "nothing to take back" if name is None else f"no snapshot {name!r}"
            raise ValueError(f"undo: {what}; named snapshots: {names} (keep={self.keep} steps are kept)")
        back = self.snapshots[fitting[-1]]
        self.state, self.events = back.state, self.events[: back.events]
        self.snapshots = self.snapshots[: fitting[-1] + back.kept]

    def reset(self, level: float | str | None = None) -> None:
        """Forget: everything (None), the "context" but not what was learned, or what one level learned.

        Args:
            level: a period, for all levels that have it; or the path of one level, as `report()` names it.
        Raises ValueError for a level that there is not.
        """
        if level is None:
            state = None
        elif level == "context":
            state = None if self.state is None else self.state.reset_context()
        else:
            state = self._without(level)
        self._become(state, Event(what=f"reset {'all' if level is None else level}", tokens=0, learn=False))

    def _without(self, which: float | str) -> State | None:
        levels = continuum_levels(self.model)
        chosen = [p for p, m in levels.items() if which in (p, p.removeprefix("pretrained."), m.period)]
        if not chosen:
            periods = ", ".join(f"{p:g}" for p in sorted({m.period for m in levels.values()}))
            raise ValueError(f"reset: no level {which!r}; give a period ({periods}), a path of report(), or 'context'")
        if self.state is None:
            return None
        tree, every = self.state.tree, torch.ones_like(self.state.tokens, dtype=torch.bool)
        fast = {p: levels[p].forget(s, every) if p in chosen else s for p, s in tree.fast.items()}
        segment = tree.segment
        if segment is not None:  # what the open segment says is asked again, of the weights as they are now
            segment = replace(segment, ready=None, is_ready=torch.zeros_like(segment.is_ready))
        return self.state._with(Carried(tree.mixers, fast, segment, tree.tokens))

    def fork(self) -> Session:
        """A session of its own that remembers all this one does, and can undo as far."""
        other = Session.__new__(Session)
        other.__dict__ = dict(self.__dict__)
        other.id = secrets.token_hex(8)
        return other

    def report(self) -> Report:
        """What was read and said, and what every level has written."""
        return report_of(self.id, self.model, self.state, self.events)

    # --- files ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session, without its snapshots. The file appears whole or not at all.

        It says in plain text which model and tokenizer it belongs to, how many tokens were read, and the clocks.
        """
        clocks = {} if self.state is None else {p: int(s.clock[0]) for p, s in self.state.tree.fast.items()}
        about = {
            "session": self.id,
            "fingerprint": self.model.fingerprint(),
            "tokenizer": self.words.fingerprint,
            "tokens": self.tokens,
            "clocks": clocks,
            "events": [vars(event) for event in self.events],
        }
        tree = {"carried": None if self.state is None else self.state.tree, "about": json.dumps(about)}
        plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        write_tree(tree, path, kind=_FORMAT, about=plain)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: ReadingModel | Reads, tokenizer: Any, *, session: str | None = None
    ) -> Session:
        """Go on with a session of a file, with equal bits.

        Args:
            session: the id that the file must have; None = any.
        Raises FileNotFoundError, or ValueError if the file is damaged, or of another model, tokenizer or session.
        """
        made = cls(model, tokenizer)
        device = next(made.model.parameters()).device
        tree, _ = read_tree(path, kind=_FORMAT, what="session", writer="Session.save", map_location=device)
        about = json.loads(tree["about"])
        for what, theirs, ours in (
            ("model", about["fingerprint"], made.model.fingerprint()),
            ("tokenizer", about["tokenizer"], made.words.fingerprint),
            ("session", about["session"], about["session"] if session is None else session),
        ):
            if theirs != ours:
                raise ValueError(f"session file {path} belongs to {what} {theirs}, not {ours}; load it with its own")
        made.id, made.events = about["session"], tuple(Event(**event) for event in about["events"])
        if tree["carried"] is not None:
            made.state = State(tree["carried"], made.model)
        return made
