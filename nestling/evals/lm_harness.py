"""Models of this library in lm-eval (the extra `eval`): log-likelihoods, rolling ones, and greedy generation.

    lm = as_lm(model, tokenizer)                          # an lm_eval.api.model.LM, also registered as "nestling"
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])
    accuracies(lm, ["hellaswag"], limit=100)              # the same as typed results; local tasks: common_sense.py

Every request is read from a fresh state, so no answer depends on another or on their order. `learn` lets the levels
write inside a request. A request longer than `max_length` loses tokens on the left, as in lm-eval's own adapters; the
models here have a state and no longest text, so by default nothing is lost. The token before an empty context is the
one that the tokenizer begins a text with, and a newline where it has none. transformers models, NestlingForCausalLM
among them, are taken by lm-eval's own adapter `hf`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nestling.data import Tokenizer
from nestling.evals.protocol import Reads, token_losses
from nestling.evals.statistics import t_quantile
from nestling.models import ReadingModel

Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation


def library() -> Any:
    """The optional package, imported where it is used."""
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError("common sense needs the package lm_eval: pip install 'nestling[eval]'") from error
    return lm_eval


@torch.no_grad()
def scored(
    model: Reads, pairs: Sequence[Pair], *, max_length: int | None, learn: bool, rows: int, device: torch.device
) -> list[tuple[float, bool]]:
    """Log-likelihood in nats of each continuation, and whether greedy decoding would give it.

    The longest are read first, `rows` side by side. Raises ValueError for a continuation longer than `max_length`.
    """
    inputs = [kept(context + continuation, max_length) for context, continuation in pairs]
    for (context, continuation), ids in zip(pairs, inputs, strict=True):
        if not continuation or not context or len(ids) <= len(continuation):
            raise ValueError(
                f"a continuation of {len(continuation)} tokens after {len(context)} has no place in "
                f"max_length={max_length}; raise max_length, or leave it out"
            )
    order = sorted(range(len(pairs)), key=lambda i: -len(inputs[i]))
    made: dict[int, tuple[float, bool]] = {}
    for begin in range(0, len(order), rows):
        part = order[begin : begin + rows]
        tokens = torch.zeros(len(part), len(inputs[part[0]]), dtype=torch.long)
        for row, i in enumerate(part):
            tokens[row, : len(inputs[i])] = torch.tensor(inputs[i])
        logits = model(tokens[:, :-1].to(device), learn=learn).logits.cpu()
        losses, right = token_losses(logits, tokens[:, 1:]), logits.argmax(-1) == tokens[:, 1:]
        for row, i in enumerate(part):
            asked = slice(len(inputs[i]) - len(pairs[i][1]) - 1, len(inputs[i]) - 1)
            made[i] = -losses[row, asked].double().sum().item(), bool(right[row, asked].all())
    return [made[i] for i in range(len(pairs))]


def kept(ids: list[int], max_length: int | None) -> list[int]:
    """The last tokens: `max_length` that are read, and the one that the last of them predicts."""
    return ids if max_length is None else ids[-(max_length + 1) :]


@torch.no_grad()
def continued(
    model: ReadingModel, tokenizer: Tokenizer, prompt: list[int], *, until: Sequence[str], most: int, learn: bool
) -> str:
    """What greedy decoding says after a prompt, up to the first of `until`, in at most `most` tokens."""
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    ids: list[int] = []
    text = ""
    for token in model.generate(tokens, most, temperature=0, learn_prompt=learn):
        ids.append(int(token))
        text = tokenizer.decode(ids)
        ends = [text.index(end) for end in until if end and end in text]
        if ends:
            return text[: min(ends)]
    return text


@cache
def adapter() -> type:
    """The class of lm-eval models that this library's are read through, registered there as "nestling"."""
    library()
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    @register_model("nestling")
    class NestlingLM(TemplateLM):
        """See the module."""

        def __init__(
            self,
            model: ReadingModel,
            tokenizer: Tokenizer,
            learn: bool = False,
            max_length: int | None = None,
            rows: int = 16,
            batch_size: int | None = None,
            **_: Any,  # what lm-eval hands to every model
        ) -> None:
            super().__init__()
            self.model, self.tokenizer, self.learn, self.max_length = model.eval(), tokenizer, learn, max_length
            self.rows = batch_size or rows
            self.special = list(map(int, tokenizer.encode("")))
            self._device = next(model.parameters()).device

        @property
        def eot_token_id(self) -> int:
            return self.special[0] if self.special else int(self.tokenizer.encode("\n")[-1])

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = list(map(int, self.tokenizer.encode(string)))
            return ids[len(self.special) :] if add_special_tokens is False else ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return scored(
                self.model,
                pairs,
                max_length=self.max_length,
                learn=self.learn,
                rows=self.rows,
                device=self._device,
            )

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            totals = []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                longest = self.max_length or max(len(ids), 1)
                windows = get_rolling_token_windows(ids, self.eot_token_id, longest, 1)
                parts = [(None, *make_disjoint_window(window)) for window in windows]
                totals.append(math.fsum(nats for nats, _ in self._loglikelihood_tokens(parts)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return [self.answer(*request.args) for request in requests]

        def answer(self, context: str, options: dict[str, Any]) -> str:
            if options.get("do_sample"):
                raise ValueError("do_sample=True: this adapter decodes greedily; leave it out")
            most = int(options.get("max_gen_toks", 256))
            prompt = self.tok_encode(context) or [self.eot_token_id]
            if self.max_length is not None:
                prompt = prompt[-max(1, self.max_length - most) :]
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            return continued(self.model, self.tokenizer, prompt, until=until, most=most, learn=self.learn)

    return NestlingLM


def as_lm(model: ReadingModel, tokenizer: Tokenizer, **options: Any) -> Any:
    """A model as lm-eval takes them. Options: `learn`, `max_length`, `rows`."""
    return adapter()(model, tokenizer, **options)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One metric of one task.

    Attributes:
        value: accuracy, or perplexity per answer. stderr: of the mean over the items (of a perplexity, to first order).
        chance: accuracy of a guess, 0 where the answer is written freely; None for what is no accuracy.
        items: the metric of each item, for a perplexity its nats. version: of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    n: int
    version: float
    items: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def columns(self) -> dict[str, str]:
        """What a table shows of it."""
        share = 1 if self.chance is None else 100
        margin = None if self.stderr is None else t_quantile(0.975, max(self.n - 1, 1)) * self.stderr * share
        return {
            "task": self.task,
            "metric": self.metric + ("" if self.chance is None else ", %"),
            "value": f"{self.value * share:.1f}" + ("" if margin is None else f" ± {margin:.1f}"),
            "chance": "" if self.chance is None else f"{100 * self.chance:.1f}",
            "n": str(self.n),
            "version": f"{self.version:g}",
        }


def accuracies(
    lm: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: Path | None = None,
    data: str | None = None,
    official: bool = True,
) -> list[Accuracy]:
    """Zero-shot scores of any model of lm-eval (an LM, see `as_lm`).

    Args:
        tasks: names known to lm-eval, or to the task files in `folder`. limit: of the items, the first so many.
        data: where the local tasks find their data. official: whether lm-eval's own tasks are known by name as well
            (their data come from the network; listing them takes seconds).
    Raises ValueError for a name that is not known.
    """
    library()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=official, metadata={"folder": data} if data else None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ValueError(f"lm-eval knows no task {name!r}; list its own with: lm-eval ls tasks")
    found = simple_evaluate(
        model=lm, tasks=list(tasks), num_fewshot=0, limit=limit, bootstrap_iters=0, task_manager=manager
    )
    return [
        accuracy(task, metric, float(found["versions"][task]), samples)
        for task, samples in found["samples"].items()
        for metric in samples[0]["metrics"]
    ]


def accuracy(task: str, metric: str, version: float, samples: Sequence[dict[str, Any]]) -> Accuracy:
    """The result of one metric from lm-eval's record of the items."""
    items = tuple(float(sample[metric]) for sample in samples)
    n = len(items)
    mean = math.fsum(items) / n
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in items) / (n - 1) / n) if n > 1 else None
    asked = [len(sample["resps"]) for sample in samples]
    is_perplexity = metric == "perplexity"
    value = math.exp(-mean) if is_perplexity else mean
    return Accuracy(
        task=task,
        metric=metric,
        value=value,
        stderr=spread if spread is None or not is_perplexity else spread * value,
        chance=None if is_perplexity else math.fsum(1 / k if k > 1 else 0 for k in asked) / n,
        n=n,
        version=version,
        items=items,
    )
