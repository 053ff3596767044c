"""Associative memories: functions with parameters that are written by descending an inner objective (Definition 1).

A memory says how to read and how an error at its output becomes a gradient of its parameters; an Objective says what
the error is, a Rule what the gradient does. Leading axes `...` are independent memories (batch rows, heads):
keys (..., N, K), values (..., N, V), N pairs per write. Nothing is averaged across them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.core.objective import Objective
from nestling.core.rule import Params, Rule, Write, apply


class AssociativeMemory(ABC):
    """A mapping from keys to values whose parameters are a dict of matrices (..., inputs, outputs)."""

    @abstractmethod
    def init(self, *lead: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        """Fresh parameters for `lead` independent memories."""

    @abstractmethod
    def read(self, params: Params, queries: Tensor) -> Tensor:
        """queries (..., N, K) -> (..., N, V)."""

    @abstractmethod
    def inputs(self, params: Params, keys: Tensor) -> dict[str, Tensor]:
        """What each matrix receives when keys (..., N, K) are read: its own keys, (..., N, inputs)."""

    @abstractmethod
    def pullback(self, params: Params, keys: Tensor, error: Tensor) -> Params:
        """Gradient of sum_n <read(k_n), error_n> for fixed error (..., N, V), in closed form."""

    def gradient(
        self, params: Params, keys: Tensor, values: Tensor | None, objective: Objective, weights: Tensor | None = None
    ) -> Params:
        """Gradient of sum_n weights_n L(read(k_n); v_n); weights (..., N) or None for ones."""
        error = objective.gradient(self.read(params, keys), values)
        return self.pullback(params, keys, error if weights is None else weights[..., None] * error)

    def write(
        self,
        params: Params,
        state: Any,
        keys: Tensor,
        values: Tensor | None,
        *,
        objective: Objective,
        rule: Rule,
        dials: Mapping[str, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Params, Any]:
        """One step of `rule` on the N pairs together; returns the new parameters and rule state."""
        params = rule.prepare(Write(params, {}, dials or {}))
        gradient = self.gradient(params, keys, values, objective, weights)
        updates, state = rule.update(gradient, state, Write(params, self.inputs(params, keys), dials or {}))
        return apply(params, updates), state


@dataclass(frozen=True)
class LinearMemory(AssociativeMemory):
    """M^T q with one matrix M (..., K, V), empty at the start."""

    key_dim: int
    value_dim: int

    def init(self, *lead: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        return {"M": torch.zeros(*lead, self.key_dim, self.value_dim, dtype=dtype, device=device)}

    def read(self, params: Params, queries: Tensor) -> Tensor:
        return queries @ params["M"]

    def inputs(self, params: Params, keys: Tensor) -> dict[str, Tensor]:
        return {"M": keys}

    def pullback(self, params: Params, keys: Tensor, error: Tensor) -> Params:
        return {"M": keys.mT @ error}


@dataclass(frozen=True)
class MLPMemory(AssociativeMemory):
    """z + W1^T silu(W2^T z): W2 (..., dim, hidden), W1 (..., hidden, dim); (89) in our orientation.

    Without the skip an empty memory could never be written through self-generated values; it is also what makes
    zero W1 the identity.
    """

    dim: int
    hidden: int
    seed: int = 0

    def init(self, *lead: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, columns: int) -> Tensor:
            matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64) / rows**0.5
            return matrix.to(dtype=dtype, device=device).expand(*lead, rows, columns).contiguous()

        return {"W2": normal(self.dim, self.hidden), "W1": normal(self.hidden, self.dim)}

    def read(self, params: Params, queries: Tensor) -> Tensor:
        return queries + F.silu(queries @ params["W2"]) @ params["W1"]

    def inputs(self, params: Params, keys: Tensor) -> dict[str, Tensor]:
        return {"W2": keys, "W1": F.silu(keys @ params["W2"])}

    def pullback(self, params: Params, keys: Tensor, error: Tensor) -> Params:
        a = keys @ params["W2"]
        s = torch.sigmoid(a)
        slope = s * (1 + a * (1 - s))  # silu'
        return {"W2": keys.mT @ ((error @ params["W1"].mT) * slope), "W1": F.silu(a).mT @ error}


def scan(
    memory: AssociativeMemory,
    params: Params,
    keys: Tensor,
    values: Tensor | None,
    *,
    objective: Objective,
    rule: Rule,
    queries: Tensor | None = None,
    state: Any = None,
    dials: Mapping[str, Tensor] | None = None,
    period: int = 1,
    read: Literal["before", "after"] = "after",
) -> tuple[Tensor, Params, Any]:
    """Any memory over a sequence: write every `period` tokens with that many pairs, read at every token.

    keys, queries (..., T, K), values (..., T, V); queries default to the keys; dials by name (..., writes), one entry
    per write. read="before": a token is read with the weights its window started from; "after" (period 1 only):
    with the weights that hold its own pair. Tokens of an unfilled last window are read but not written.
    Returns outputs (..., T, V), parameters, rule state.
    Raises ValueError for a period < 1, or for read="after" with a longer period (it would look ahead).
    """
    if period < 1 or (read == "after" and period != 1):
        raise ValueError(f'period is {period} with read={read!r}; need period >= 1, and read="before" beyond 1')
    queries = keys if queries is None else queries
    state = rule.init(params) if state is None else state
    outputs = []
    for n, start in enumerate(range(0, keys.shape[-2], period)):
        window = slice(start, start + period)
        if read == "before":
            outputs.append(memory.read(params, queries[..., window, :]))
        if start + period <= keys.shape[-2]:
            pairs = keys[..., window, :], None if values is None else values[..., window, :]
            now = {name: dial[..., n] for name, dial in (dials or {}).items()}
            params, state = memory.write(params, state, *pairs, objective=objective, rule=rule, dials=now)
        if read == "after":
            outputs.append(memory.read(params, queries[..., window, :]))
    return torch.cat(outputs, dim=-2), params, state
