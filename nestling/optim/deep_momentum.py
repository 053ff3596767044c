"""Deep momentum (DMGD): the momentum is an MLP that learns from gradients, and whose answer moves the weights, (50).

The memory of a matrix G (out, in) is one MLP with `hidden` units on its rows (or columns, whichever are shorter, d
numbers), shared by all of them:

    m(z) = z + W1^T silu(W2^T phi(z))        z: a row of G, divided by the RMS of all entries of G
    m <- m_0 + alpha (m - m_0) - eta grad 1/2 mean |m(z_{i-1}) - z_i|^2        key: a row one step ago; value: now
    W <- W - lr sigma(RMS m(z_i))

What repeats from one step to the next can be predicted and passes; noise cannot, and shrinks. Before it has learned,
m is the identity and the optimizer gradient descent.

DEVIATION: (50) prints the value-less objective <m(u), 1> as its example. Read at a gradient, a memory written so does
not answer a descent direction (its answer is along the vector of ones); "any objective" of (50) is the L2 regression
above. A memory per entry or of numel x hidden weights (as one reads elsewhere) would not fit: this one has
2 d hidden numbers, plus the last gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.core import rule as rules
from nestling.core.memory import AssociativeMemory, MLPMemory
from nestling.core.objective import L2Regression, Objective
from nestling.optim.base import Group, Params, State
from nestling.optim.generalised import Form, Generalised, Output, Pairs, Reading

FeatureMap = Callable[[Tensor], Tensor]  # (N, d) -> (N, any width)


class DeepMomentum(Generalised):
    """Momentum as a trained MLP memory of gradients; see the module for its equations.

    Attributes:
        momentum: part of what the memory learned that it keeps at every step (alpha).
        inner_lr: rate of the memory's own step; each matrix of the MLP moves at inner_lr / (1 + mean |its input|^2),
            so that rates up to 1 are stable for any gradients.
        hidden: width of the MLP.
        objective: what the memory descends; RobustLp(1.0) for gradients with outliers.
        feature_map: phi of (51), e.g. `powers`.
        output: sigma of (52), e.g. nestling.optim.generalised.orthogonal.

    Cost per step and parameter: about 14 hidden multiplications and additions per entry; kept: the last gradient and
    hidden (d + width of phi) numbers.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.99,
        *,
        inner_lr: float = 0.5,
        hidden: int = 32,
        objective: Objective | None = None,
        feature_map: FeatureMap | None = None,
        output: Output = torch.clone,
        weight_decay: float = 0.0,
    ) -> None:
        form = deep(hidden, objective or L2Regression(), feature_map or torch.clone, output)
        super().__init__(params, lr, form, weight_decay=weight_decay, momentum=momentum, inner_lr=inner_lr)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not (0 <= group["momentum"] <= 1 and 0 <= group["inner_lr"] <= 1):
            raise ValueError(f"momentum={group['momentum']}, inner_lr={group['inner_lr']}; use numbers in 0 ... 1")


def deep(hidden: int, objective: Objective, feature_map: FeatureMap, output: Output) -> Form:
    """DMGD as a line of the generalised form: regression x decay to the empty memory x MLP x output."""
    return Form(
        memory=lambda keys, values: ResidualMLP(values, hidden, feature_map),
        objective=objective,
        rule=lambda empty: rules.chain(normalised_descent("inner_lr"), decay_towards("momentum", empty)),
        reading=Successive(),
        output=output,
    )


@dataclass(frozen=True)
class Successive(Reading):
    """Keys are the rows of the last gradient, values those of this one; the step is the answer to this one."""

    def init(self, G: Tensor) -> State:
        return {"last": torch.zeros_like(short_rows(G))}

    def widths(self, G: Tensor) -> tuple[int, int]:
        return min(G.shape), min(G.shape)

    def pairs(self, G: Tensor, state: State) -> Pairs:
        z = short_rows(G) / size(G)
        last, state["last"] = state["last"], z
        return Pairs(last if state["step"] > 1 else None, z, z)

    def step(self, read: Tensor, G: Tensor) -> Tensor:
        return size(G) * (read if G.shape[1] <= G.shape[0] else read.mT)


@dataclass(frozen=True)
class ResidualMLP(AssociativeMemory):
    """z + W1^T silu(W2^T phi(z)), empty with W1 = 0: core's MLPMemory with a feature map before it."""

    dim: int
    hidden: int
    feature_map: FeatureMap

    def init(self, *lead: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> rules.Params:
        width = self.feature_map(torch.zeros(1, self.dim)).shape[-1]
        made = MLPMemory(width, self.hidden).init(*lead, dtype=dtype, device=device)
        return {"W2": made["W2"], "W1": made["W1"].new_zeros(*lead, self.hidden, self.dim)}

    def read(self, params: rules.Params, queries: Tensor) -> Tensor:
        return queries + F.silu(self.feature_map(queries) @ params["W2"]) @ params["W1"]

    def inputs(self, params: rules.Params, keys: Tensor) -> dict[str, Tensor]:
        return MLPMemory(self.dim, self.hidden).inputs(params, self.feature_map(keys))

    def pullback(self, params: rules.Params, keys: Tensor, error: Tensor) -> rules.Params:
        return MLPMemory(self.dim, self.hidden).pullback(params, self.feature_map(keys), error)


def short_rows(G: Tensor) -> Tensor:
    """The matrix with rows no longer than its columns."""
    return G if G.shape[1] <= G.shape[0] else G.mT


def size(G: Tensor) -> Tensor:
    """The RMS of all entries; not 0."""
    return G.square().mean().sqrt().clamp_min(torch.finfo(G.dtype).tiny)


def powers(z: Tensor) -> Tensor:
    """A feature map: z, and its squares with the sign kept, as keys of twice the width, (51)."""
    return torch.cat([z, z * z.abs()], -1)


def normalised_descent(eta: rules.Dial) -> rules.Rule:
    """W <- W - eta / (1 + mean |x|^2) mean gradient, over the N inputs x of W: at most DGD's step, for any inputs."""

    def update(gradient: rules.Params, state: None, write: rules.Write) -> tuple[rules.Params, None]:
        made = {}
        for name, u in gradient.items():
            x = write.inputs[name]
            made[name] = -write.dial(eta) * u / (x.shape[-2] + x.square().sum((-2, -1), keepdim=True))
        return made, state

    return rules.Rule(lambda params: None, update)


def decay_towards(alpha: rules.Dial, goal: rules.Params) -> rules.Rule:
    """Keeps the part alpha of what differs from `goal`: the memory returns to it, and not to zero."""

    def update(updates: rules.Params, state: None, write: rules.Write) -> tuple[rules.Params, None]:
        rest = write.dial(alpha) - 1
        return {n: u + rest * (write.params[n] - goal[n]) for n, u in updates.items()}, state

    return rules.Rule(lambda params: None, update)
