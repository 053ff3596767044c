"""The generalised form: an optimizer is objective x retention x memory x output, (35)-(37), (52), (59), (60).

A memory of gradients stores pairs of keys and values, by a step of its rule on its objective; what is read from it,
through an output, moves the weights. Each optimizer is one line (`momentum`, `delta_momentum`, `muon`, ...), computed
here by the memories, objectives and rules of core: the definition that the fast ones are tested against.

`weights_step` is the form for the weights themselves (59): keys are the layer's inputs, and the value
u = -dL/dy is produced by the memory that is written. Dot product gives SGD, L2 regression gives DGD.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.core import rule as rules
from nestling.core.memory import AssociativeMemory, LinearMemory
from nestling.core.objective import DotProduct, L2Regression, Objective
from nestling.ops import dispatch
from nestling.optim.base import Group, Optimizer, Params, State, decay_weights, matrix

Output = Callable[[Tensor], Tensor]  # from what was read (out, in) to the step of the weights, before the rate


class Pairs(NamedTuple):
    """What one gradient gives the memory. keys None = nothing to write yet."""

    keys: Tensor | None  # (N, K)
    values: Tensor | None  # (N, V)
    queries: Tensor  # (M, K), whose answers are the step


class Reading(ABC):
    """How a gradient (out, in) becomes pairs, and what the memory answers a step."""

    def init(self, G: Tensor) -> State:
        """What is kept from one gradient to the next, beside the memory."""
        return {}

    @abstractmethod
    def widths(self, G: Tensor) -> tuple[int, int]:
        """Widths of keys and values."""

    @abstractmethod
    def pairs(self, G: Tensor, state: State) -> Pairs:
        """The pairs of one gradient; may write the state."""

    @abstractmethod
    def step(self, read: Tensor, G: Tensor) -> Tensor:
        """The answers to the queries as a step (out, in)."""


@dataclass(frozen=True)
class Labelled(Reading):
    """Keys are the rows of G, the value of a row is the same row of P; a linear memory is read whole, (46)-(49).

    P is the identity (the memory says which output a gradient belongs to) or a function of G. With erase_rate the
    value is P / erase_rate, which gives the write rate 1 and the erase its own; normalize: see DeltaMomentum.
    """

    P: Callable[[Tensor], Tensor] | None = None  # G -> the values (out, V)
    erase_rate: float = 1.0
    normalize: bool = False

    def widths(self, G: Tensor) -> tuple[int, int]:
        return G.shape[1], G.shape[0]

    def pairs(self, G: Tensor, state: State) -> Pairs:
        norm = torch.linalg.matrix_norm(G).clamp_min(torch.finfo(G.dtype).tiny) if self.normalize else 1.0
        values = torch.eye(len(G), dtype=G.dtype, device=G.device) if self.P is None else self.P(G)
        queries = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
        return Pairs(G / norm, values * norm / self.erase_rate, queries)

    def step(self, read: Tensor, G: Tensor) -> Tensor:
        return read.mT


@dataclass(frozen=True, kw_only=True)
class Form:
    """One optimizer: pairs and their objective, a rule that holds step and retention, a memory, an output."""

    memory: Callable[[int, int], AssociativeMemory]  # from the widths of keys and values
    objective: Objective
    rule: Callable[[rules.Params], rules.Rule]  # from the empty memory; dials are hyper-parameters of the group
    reading: Reading
    output: Output = torch.clone


class Generalised(Optimizer):
    """Any `Form` as an optimizer: write the memory with the gradient's pairs, read it, move the weights.

    dials are the hyper-parameters that the form's rule names, such as momentum=0.9. weight_decay is decoupled.
    Memories are kept in float32 at least. One parameter after the other: a definition, not a fast path.
    """

    def __init__(self, params: Params, lr: float, form: Form, *, weight_decay: float = 0.0, **dials: float) -> None:
        self.form, self.dials = form, tuple(dials)
        self.empties: dict[tuple[object, ...], rules.Params] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **dials}, foreach=False)

    def init(self, p: Tensor, group: Group) -> State:
        G = matrix(p).to(torch.promote_types(p.dtype, torch.float32))
        return {"memory": self.empty(G), **self.form.reading.init(G)}

    def empty(self, G: Tensor) -> rules.Params:
        """The memory before its first write; one for all parameters of equal widths, never written in place."""
        widths = self.form.reading.widths(G)
        key = (*widths, G.dtype, G.device)
        if key not in self.empties:
            self.empties[key] = self.form.memory(*widths).init(dtype=G.dtype, device=G.device)
        return self.empties[key]

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        decay_weights(params, group)
        for p, g, state in zip(params, grads, states, strict=True):
            G = matrix(g).to(torch.promote_types(g.dtype, torch.float32))
            p.sub_(self.step_of(G, state, group).reshape(p.shape).to(p.dtype), alpha=group["lr"])

    def step_of(self, G: Tensor, state: State, group: Group) -> Tensor:
        """Write the memory with one gradient (out, in) and read the step."""
        form = self.form
        memory = form.memory(*form.reading.widths(G))
        keys, values, queries = form.reading.pairs(G, state)
        if keys is not None:
            rule = form.rule(self.empty(G))
            dials = {name: G.new_full((), group[name]) for name in self.dials}
            state["memory"], state["rule"] = memory.write(
                state["memory"], state.get("rule", rule.init(state["memory"])), keys, values,
                objective=form.objective, rule=rule, dials=dials,
            )  # fmt: skip
        return form.output(form.reading.step(memory.read(state["memory"], queries), G))


def linear(
    objective: Objective, *, rate: float = 1.0, reading: Reading | None = None, output: Output = torch.clone
) -> Form:
    """A form whose memory is one matrix that keeps the part `momentum` of itself at every write."""
    rule = rules.chain(rules.gradient_descent(rate), rules.decay("momentum"))
    return Form(
        memory=LinearMemory, objective=objective, rule=lambda empty: rule, reading=reading or Labelled(), output=output
    )


def orthogonal(step: Tensor) -> Tensor:
    """Newton-Schulz as the output of a memory, (52)."""
    return dispatch.newton_schulz(step)


def preconditioned(P: Callable[[Tensor], Tensor]) -> Form:
    """Momentum whose values are the rows of P(G): m <- alpha m + P^T G, (46), (47)."""
    return linear(DotProduct(), reading=Labelled(P=P))


def delta(erase_rate: float, normalize: bool = True) -> Form:
    """The memory whose objective is L2 regression: what it said about these inputs makes room, (48), (49)."""
    reading = Labelled(erase_rate=erase_rate, normalize=normalize)
    return linear(L2Regression(), rate=erase_rate, reading=reading)


# one line each; retention is the dial momentum, and with momentum=0 the first is gradient descent
momentum = linear(DotProduct())
delta_momentum = delta(erase_rate=0.1)
muon = linear(DotProduct(), output=orthogonal)


def weights_step(W: Tensor, x: Tensor, u: Tensor, objective: Objective, rule: rules.Rule) -> Tensor:
    """(59) for a layer's weight (out, in): one write of the pairs x (N, in), u (N, out), u = -dL/dy of each output.

    SGD is DotProduct() with gradient_descent(lr). DGD is DotProduct() with dgd(lr): its implicit step adds the
    quadratic term of the L2 objective. L2Regression() with gradient_descent(lr) is DGD's explicit step.
    """
    memory = LinearMemory(W.shape[1], W.shape[0])
    written, _ = memory.write({"M": W.mT}, rule.init({"M": W.mT}), x, u, objective=objective, rule=rule)
    return written["M"].mT
