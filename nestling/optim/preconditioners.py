"""Preconditioners P of a memory of gradients: what stands between the gradient and what the momentum keeps, P(g).

In (46), (47) P is the value that the momentum stores under a gradient; here it is a mapping with a memory of its own
(40), written at every step. `Diagonal` and `Kronecker` solve the L2 objective of (101), element by element and on the
two sides of a matrix; `Given` is any fixed mapping.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


class Preconditioner(ABC):
    """From the gradients of several parameters, and what is kept for each, to P(g)."""

    def init(self, p: Tensor) -> State:
        """What is kept for one parameter."""
        return {}

    @abstractmethod
    def __call__(self, grads: list[Tensor], states: list[State]) -> list[Tensor]:
        """P(g) of each; writes the states. `states[i]["step"]` counts this step already."""


def check_mean(what: object, beta: float, eps: float) -> None:
    """Raise ValueError unless beta and eps can be used."""
    if not 0 <= beta < 1 or not eps >= 0:
        raise ValueError(f"{type(what).__name__}: beta={beta}, eps={eps}; use 0 <= beta < 1 and eps >= 0")


@dataclass(frozen=True)
class Given(Preconditioner):
    """Any mapping of one gradient to one of the same shape, e.g. Given(lambda g: P @ g)."""

    mapping: Callable[[Tensor], Tensor]

    def __call__(self, grads: list[Tensor], states: list[State]) -> list[Tensor]:
        return [self.mapping(g) for g in grads]


@dataclass(frozen=True, kw_only=True)
class Diagonal(Preconditioner):
    """g / (sqrt(v) + eps), v the bias-corrected mean of g^2: one L2 regression per element, (100)-(105).

    The paper's (105) divides by the root of a sum; a mean forgets, and keeps the step's size. DEVIATION.
    """

    beta: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_mean(self, self.beta, self.eps)

    def init(self, p: Tensor) -> State:
        return {"second_moment": torch.zeros_like(p)}

    def __call__(self, grads: list[Tensor], states: list[State]) -> list[Tensor]:
        v = [state["second_moment"] for state in states]
        torch._foreach_mul_(v, self.beta)
        torch._foreach_addcmul_(v, grads, grads, 1 - self.beta)
        roots = list(torch._foreach_sqrt(v))
        torch._foreach_div_(roots, [(1 - self.beta ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(roots, self.eps)
        return list(torch._foreach_div(grads, roots))


@dataclass(frozen=True, kw_only=True)
class Kronecker(Preconditioner):
    """L^(-1/4) G R^(-1/4), L and R the means of G G^T and G^T G: the outer-product form (106)-(111) on both sides.

    A side longer than `largest` has no factor, and the other takes the whole exponent -1/2. Parameters without a
    factor, and vectors, are preconditioned by `rest`. Inverse roots are taken every `period` steps, in float32 or
    wider, with eigenvalues lifted by eps times the largest.

    Cost: two products of G with itself per step; an eigendecomposition per side and period, O(n^3).
    """

    beta: float = 0.99
    eps: float = 1e-6
    period: int = 10
    largest: int = 2048
    rest: Diagonal = Diagonal()

    def __post_init__(self) -> None:
        check_mean(self, self.beta, self.eps)
        if self.period < 1:
            raise ValueError(f"period of Kronecker is {self.period} steps; use 1 or more")

    def sides(self, p: Tensor) -> dict[str, int]:
        """The sides of the matrix that have a factor, and their lengths."""
        if p.dim() < 2:
            return {}
        lengths = {"left": p.shape[0], "right": p.numel() // max(p.shape[0], 1)}
        return {side: n for side, n in lengths.items() if 0 < n <= self.largest}

    def init(self, p: Tensor) -> State:
        made: State = {} if self.sides(p) else self.rest.init(p)
        for side, n in self.sides(p).items():
            made[side] = torch.zeros(n, n, dtype=wide(p), device=p.device)
            made[f"{side}_root"] = torch.eye(n, dtype=wide(p), device=p.device)
        return made

    def __call__(self, grads: list[Tensor], states: list[State]) -> list[Tensor]:
        return [
            self.on_matrix(g, state) if self.sides(g) else self.rest([g], [state])[0]
            for g, state in zip(grads, states, strict=True)
        ]

    def on_matrix(self, g: Tensor, state: State) -> Tensor:
        """P(g) of one matrix, (out, in) after flattening."""
        G = g.flatten(1).to(wide(g))
        sides = self.sides(g)
        for side in sides:
            state[side].lerp_(G @ G.mT if side == "left" else G.mT @ G, 1 - self.beta)
            if (state["step"] - 1) % self.period == 0:
                mean = state[side] / (1 - self.beta ** state["step"])
                state[f"{side}_root"].copy_(inverse_root(mean, 2 * len(sides), self.eps))
        left = state["left_root"] @ G if "left" in sides else G
        return (left @ state["right_root"] if "right" in sides else left).to(g.dtype).view_as(g)


def inverse_root(A: Tensor, order: int, eps: float) -> Tensor:
    """A^(-1/order) of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(A)
    lifted = values.clamp_min(0) + eps * values[-1] + torch.finfo(A.dtype).tiny
    return (vectors * lifted ** (-1 / order)) @ vectors.mT


def wide(p: Tensor) -> torch.dtype:
    """The dtype of a factor: at least float32."""
    return torch.promote_types(p.dtype, torch.float32)
