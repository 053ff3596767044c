"""What every memory's chunk consists of: solve for its writes, commit them, read between them. README.md derives it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.rule import Rule

EPS = 1e-6  # of unit length


class Writes(NamedTuple):
    """The writes of one chunk into the matrices E of a group: E_t = e^{g_t} E + sum_{s<=t} e^{g_t - g_s} k_s p_s^T."""

    keys: Tensor  # (B, G, C, F)
    values: Tensor  # (B, G, M, C, V), p
    log_decay: Tensor  # (B, G, M, C), g, cumulative inside the chunk


def solve(
    k: Tensor, u: Tensor, read_S: Tensor, read_E: Tensor, eta: Tensor, g: Tensor, rule: Rule, erase: str
) -> Writes:
    """The writes p of a chunk: (I + L) p = eta (u - M₀ k - e^ḡ E k), L_ts = eta_t e^{ḡ_t - g_s} k_t·k_s for s < t.

    k (B, G, C, F); u, read_S, read_E (B, G, C, M, V); eta, g (B, G, M, C). ḡ is g where the erase acts on the decayed
    memory and g before this token's decay where it acts beside it; M₀ k is absent where memories decay to zero.
    """
    u, eta_t = u.transpose(2, 3), eta[..., None]
    if erase == "none":
        return Writes(k, eta_t * u, g)
    decay = g if erase == "decayed" else shift(g)
    kept = decay.exp()[..., None] * read_E.transpose(2, 3)
    if rule.decay_to == "initial":
        kept = kept + (read_S - read_E).transpose(2, 3)
    L = decay_matrix(decay, g) * eta_t * (k @ k.mT).unsqueeze(2)
    p = torch.linalg.solve_triangular(L, eta_t * (u - kept), upper=False, unitriangular=True)
    return Writes(k, p, g)


def commit(E: Tensor, written: Writes, full: Tensor | None) -> Tensor:
    """The matrices after the chunk, in the rows that filled it."""
    k, p, g = written
    end = g[..., -1:]
    p = (end - g).exp()[..., None] * p  # (B, G, M, C, V)
    grown = (k.mT @ p.transpose(2, 3).flatten(-2)).unflatten(-1, E.shape[-2:])
    new = end.exp().unsqueeze(2) * E + grown
    return new if full is None else torch.where(full, new, E)


def read_last(q: Tensor, initial: Tensor, E: Tensor, written: Writes, rule: Rule) -> Tensor:
    """q (B, G, C, F) through the last matrix of each group: M_{t-1} inside the chunk, or its first state."""
    E = E[..., -1, :]
    if rule.read == "anchor":
        return q @ (initial[..., -1, :] + E if rule.decay_to == "initial" else E)
    y = read_written(q, E, written.keys, written.values[:, :, -1], written.log_decay[:, :, -1])
    return y + q @ initial[..., -1, :] if rule.decay_to == "initial" else y


def read_written(q: Tensor, E: Tensor, k: Tensor, p: Tensor, g: Tensor) -> Tensor:
    """q_t through E_{t-1}: q, k (..., C, F), E (..., F, V), p (..., C, V), g (..., C) → (..., C, V)."""
    before = shift(g)
    return before.exp()[..., None] * (q @ E) + (decay_matrix(before, g) * (q @ k.mT)) @ p


def shift(g: Tensor) -> Tensor:
    """Cumulative log decay before each token's own."""
    return functional.pad(g[..., :-1], (1, 0))


def decay_matrix(later: Tensor, g: Tensor) -> Tensor:
    """e^{later_t - g_s} for s < t, else 0; (..., C) → (..., C, C). Only differences <= 0 are exponentiated."""
    C = g.shape[-1]
    unseen = torch.ones(C, C, dtype=torch.bool, device=g.device).triu()
    return (later[..., :, None] - g[..., None, :]).masked_fill(unseen, -torch.inf).exp()


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
