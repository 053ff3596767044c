"""What one part of a chunk consists of: its writes, the matrices after them, and reads in between (README.md).

A matrix M and its surprise S are the states of one linear system, stacked along an axis of length 2, or 1 without
momentum. Letters: C tokens of the part, S states of a matrix, F its input width, V its output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Write = tuple[Tensor, Tensor]  # keys (..., C, F) and values (..., C, V) of a matrix: each token adds f e^T


class Decays(NamedTuple):
    """What is left of earlier things inside one part; the same for all matrices of a head."""

    reach: Tensor  # (..., C, S) of the first states, in M_t
    writes: Tensor  # (..., C, C) c_ts, of write s in M_t
    transfer: Tensor  # (..., S, S) of the first states (last axis) in the last ones
    last: Tensor  # (..., C, S) of write s in the last states


def decays(log_decay: Tensor, log_momentum: Tensor | None, alive: Tensor | None = None) -> Decays:
    """M_t = A_t M_0 + sum_{s<=t} A_t/A_s S_s and S_s = H_s S_0 + sum_{r<=s} H_s/H_r w_r, so c = (A_t/A_s)(H_s/H_r).

    (..., C) each. Tokens that are not alive pass S on without adding it to M.
    """
    g = log_decay.cumsum(-1)
    A, from_start = decay_matrix(g), g.exp()[..., None]
    if log_momentum is None:
        return Decays(from_start, A, from_start[..., -1:, :], A[..., -1, :, None])
    m = log_momentum.cumsum(-1)
    if alive is not None:
        A = A * alive[..., None, :]
    H, echo = decay_matrix(m), m.exp()[..., None]
    reach, writes = torch.cat([from_start, A @ echo], -1), A @ H
    end = torch.cat([torch.zeros_like(echo[..., -1, :]), echo[..., -1, :]], -1)
    transfer = torch.stack([reach[..., -1, :], end], -2)
    return Decays(reach, writes, transfer, torch.stack([writes[..., -1, :], H[..., -1, :]], -1))


def written(k: Tensor, v: Tensor, eta: Tensor, M: list[Tensor]) -> list[Write]:
    """For each matrix, keys f (..., C, F) and values -eta e (..., C, V): -eta grad 1/2 |M(k) - v|^2 = -eta f e^T.

    k, v (..., C, K), eta (..., C, 1), M the matrices (..., F, V) at the last chunk border.
    """
    if len(M) == 1:
        return [(k, eta * (v - k @ M[0]))]
    a = k @ M[0]
    s = a.sigmoid()
    h = a * s
    out = eta * (v - k - h @ M[1])
    return [(k, (out @ M[1].mT) * (s + h * (1 - s))), (h, out)]


def commit(state: Tensor, keys: Tensor, values: Tensor, by: Decays) -> Tensor:
    """The states (..., S, F, V) after the part's last token."""
    kept = by.transfer @ state.flatten(-2)  # (..., S, F V)
    grown = weigh(keys, by.last).mT @ values  # (..., S F, V)
    return kept.view_as(state) + grown.view_as(state)


def read(q: Tensor, state: Tensor, rest: Tensor | None, keys: Tensor, values: Tensor, by: Decays) -> Tensor:
    """q_t through the matrix as it is at t: (..., C, F) -> (..., C, V)."""
    y = weigh(q, by.reach) @ state.flatten(-3, -2) + (by.writes * (q @ keys.mT)) @ values
    return y if rest is None else y + q @ rest


def read_memory(
    q: Tensor,
    states: list[Tensor],
    rest: tuple[Tensor, ...] | None,
    writes: list[Write],
    by: Decays,
) -> Tensor:
    """M_t(q_t): (..., C, K) -> (..., C, K)."""
    z = q
    for i, (state, made) in enumerate(zip(states, writes, strict=True)):
        z = read(functional.silu(z) if i else z, state, None if rest is None else rest[i], *made, by)
    return z if len(states) == 1 else q + z


def weigh(x: Tensor, by: Tensor) -> Tensor:
    """x (..., C, F) once for each of by (..., C, S), side by side: (..., C, S F)."""
    return x * by if by.shape[-1] == 1 else (by[..., :, None] * x[..., None, :]).flatten(-2)


def decay_matrix(g: Tensor) -> Tensor:
    """exp(g_t - g_s) for s <= t, else 0: (..., C) -> (..., C, C). Only differences <= 0 are exponentiated."""
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    return (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp()
