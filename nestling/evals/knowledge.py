"""Knowledge incorporation: a model reads a passage and learns; its context is cleared; then it is asked about it.

    passages = one_per_article(read_passages(locate(SQUAD, folder)), 512, 1024)
    conditions = knowledge(model, tokenizer, passages, times=(1, 4))
    less_bits(conditions, "another", "own", times=4)       # what reading this passage brought, and another did not
    facts(conditions, times=4)                             # of that, what belongs to the question

The task of SEAL (Zweiger et al. 2025) with answers scored by their probability: bits per byte of " answer" after
"Question: ...\\nAnswer:", and whether greedy decoding would give it. Each question is asked

| condition | of a model that |
|---|---|
| nothing | has read nothing |
| own | has read the passage `times` times in a row with its levels learning, and then lost the context |
| another | has read the passage of another article instead, as often |
| context | has the passage before the question, and learned nothing |

and nothing is learned from the questions. Own against nothing is what reading brought; own against another leaves what
is about the passage, without the style, spelling and words of any encyclopedia. That may still be the passage's words
alone: so each question is also scored with the answer to another question of the passage (`swapped`). A fact is learned
as far as reading makes the right answer likelier than the swapped one. The passage itself, read again from its start,
is scored in the same conditions (not in its own context).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.data import Tokenizer
from nestling.data.questions import Passage, Question
from nestling.evals.protocol import Reads, token_losses
from nestling.evals.statistics import Interval, interval, paired
from nestling.models import State

CONDITIONS = ("nothing", "own", "another", "context")
VERSION = 1
Memories = dict[int, State]  # by how often the passage was read


@dataclass(frozen=True, kw_only=True)
class Condition:
    """All passages under one condition; one number per passage, in their order.

    Attributes:
        name: of CONDITIONS. times: how often a passage was read before, 0 = never.
        bits: per byte of the answers. swapped: the same for the answer to another question of the passage.
        exact: share of the questions whose answer greedy decoding would give.
        passage: bits per byte of the passage itself; None in the condition `context`.
        questions: how many, over all passages.
    """

    name: str
    times: int
    bits: tuple[float, ...]
    swapped: tuple[float, ...]
    exact: tuple[float, ...]
    passage: tuple[float, ...] | None
    questions: int
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def columns(self) -> dict[str, str]:
        """What a table shows of it; intervals over the passages."""
        return {
            "condition": self.name,
            "times": str(self.times),
            "bits per answer byte": shown(interval(self.bits)),
            "of swapped answers": shown(interval(self.swapped)),
            "answers right, %": f"{100 * sum(self.exact) / len(self.exact):.1f}",
            "bits per passage byte": "" if self.passage is None else shown(interval(self.passage)),
            "passages": str(len(self.bits)),
            "questions": str(self.questions),
        }


def shown(value: Interval) -> str:
    """A mean and its interval, to a hundredth of a bit."""
    if value.low is None or value.high is None:
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


@torch.no_grad()
def knowledge(
    model: Reads, tokenizer: Tokenizer, passages: Sequence[Passage], *, times: Sequence[int] = (1, 4)
) -> list[Condition]:
    """Every condition, `own` and `another` once for each of `times`.

    The other passage is the one before in the list. Raises ValueError if that is of the same article, or there is none,
    and for a passage whose questions all have one answer.
    """
    if any(passage.title == passages[i - 1].title for i, passage in enumerate(passages)) or not passages:
        raise ValueError(f"passages: two neighbours of {len(passages)} are of one article; give one of each article")
    if not all(len({q.answer for q in passage.questions}) > 1 for passage in passages):
        raise ValueError("passages: one has no two different answers; leave it out")
    keys = [("nothing", 0), *((name, n) for n in times for name in ("own", "another")), ("context", 0)]
    found: dict[tuple[str, int], list[tuple[float, float, float, float | None]]] = {key: [] for key in keys}
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    other = dict(memories(model, tokenizer, passages[-1], times, device))
    for passage in passages:
        own = dict(memories(model, tokenizer, passage, times, device))
        for (name, n), made in found.items():
            state = {"own": own, "another": other}.get(name, {}).get(n)
            before = passage.text if name == "context" else ""
            bits, exact = ask(model, tokenizer, passage.questions, before=before, state=state, device=device)
            wrong, _ = ask(model, tokenizer, swapped(passage.questions), before=before, state=state, device=device)
            again = None if before else recited(model, tokenizer, passage.text, state, device)
            made.append((bits, wrong, exact, again))
        other = own
    count = sum(len(passage.questions) for passage in passages)
    return [
        Condition(
            name=name,
            times=n,
            bits=tuple(bits for bits, *_ in made),
            swapped=tuple(wrong for _, wrong, *_ in made),
            exact=tuple(exact for *_, exact, _ in made),
            passage=None if name == "context" else tuple(again for *_, again in made if again is not None),
            questions=count,
        )
        for (name, n), made in found.items()
    ]


def swapped(questions: Sequence[Question]) -> list[Question]:
    """Every question with the next answer, of the questions in a circle, that is not its own."""
    made = []
    for i, q in enumerate(questions):
        others = [*questions[i + 1 :], *questions[:i]]
        made.append(Question(q.question, next(other.answer for other in others if other.answer != q.answer)))
    return made


def memories(
    model: Reads, tokenizer: Tokenizer, passage: Passage, times: Sequence[int], device: torch.device
) -> Iterator[tuple[int, State]]:
    """What is left of the passage after it was read so many times in a row, without its context."""
    tokens = row(tokenizer.encode(f"{passage.text}\n"), device)
    state: State | None = None
    for n in range(1, max(times, default=0) + 1):
        state = model(tokens, state, learn=True).state
        if n in times:
            yield n, state.reset_context()


def ask(
    model: Reads,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    before: str = "",
    state: State | None = None,
    device: torch.device,
) -> tuple[float, float]:
    """Bits per byte of the answers, and the share of questions answered without a wrong token; nothing is learned."""
    start = f"{before}\n" if before else ""
    prompts = [f"{start}Question: {q.question}\nAnswer:" for q in questions]
    whole = [row(tokenizer.encode(f"{p} {q.answer}"), device) for p, q in zip(prompts, questions, strict=True)]
    first = [len(tokenizer.encode(prompt)) for prompt in prompts]
    size = max(tokens.shape[1] for tokens in whole)
    tokens = torch.cat([torch.nn.functional.pad(t, (0, size - t.shape[1])) for t in whole])
    rows = None if state is None else state.select([0] * len(tokens))
    logits = model(tokens[:, :-1], rows, learn=False).logits
    losses, wrong = token_losses(logits, tokens[:, 1:]), logits.argmax(-1) != tokens[:, 1:]
    nats, right = 0.0, 0
    for i, (begin, own) in enumerate(zip(first, whole, strict=True)):
        answer = slice(begin - 1, own.shape[1] - 1)
        nats += losses[i, answer].double().sum().item()
        right += not bool(wrong[i, answer].any())
    asked = sum(len(f" {q.answer}".encode()) for q in questions)
    return nats / (math.log(2) * asked), right / len(questions)


def recited(model: Reads, tokenizer: Tokenizer, text: str, state: State | None, device: torch.device) -> float:
    """Bits per byte of a text read from its start, the first token given; nothing is learned."""
    tokens = row(tokenizer.encode(text), device)
    losses = token_losses(model(tokens[:, :-1], state, learn=False).logits, tokens[:, 1:])
    return losses.double().sum().item() / (math.log(2) * len(text.encode()))


def row(ids: Any, device: torch.device) -> Tensor:
    """(1, n) of the ids of a text."""
    return torch.as_tensor(ids, dtype=torch.long, device=device)[None]


def condition(made: Sequence[Condition], name: str, times: int = 0) -> Condition:
    """The one of that name and number of readings (which only `own` and `another` have)."""
    times = times if name in ("own", "another") else 0
    return next(c for c in made if (c.name, c.times) == (name, times))


def less_bits(made: Sequence[Condition], worse: str, better: str, times: int) -> Interval:
    """By how many bits per answer byte one condition is below another, with its interval over the passages."""
    return paired(condition(made, worse, times).bits, condition(made, better, times).bits)


def facts(made: Sequence[Condition], times: int) -> Interval:
    """By how many bits per byte the right answers gained on the swapped ones through reading, over the passages."""
    before, after = condition(made, "nothing"), condition(made, "own", times)
    return paired(preference(after), preference(before))


def preference(asked: Condition) -> list[float]:
    """Bits per byte by which the right answers are likelier than the swapped ones, by passage."""
    return [wrong - right for right, wrong in zip(asked.bits, asked.swapped, strict=True)]
