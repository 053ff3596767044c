"""What every memory's chunk consists of: gates, targets, the solve for its writes, their commit, reads between them.

README.md derives it. Letters: B batch, H heads, C length of the part of a chunk, M memories, F key width of a matrix,
V its value width, G groups that share their keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.rule import Rule
from nestling.ops.self_modifying.triangular import decays, written

EPS = 1e-6  # of unit length
Matrices = list[Tensor]  # (B, G, F, M, V) each, what decays: the matrices of one group lie side by side, one key each


class Gates:
    """From the outputs of the eta and alpha memories to each memory's write rate and log decay."""

    def __init__(self, parameters: tuple[Tensor, ...], eta_max: float) -> None:
        weight, bias, rates = parameters
        self.weight = weight[..., None]  # (2, H, K, 1)
        self.bias = bias[..., None, None]  # (2, H, 1, 1)
        self.rates = rates[..., None]  # (H, M, 1)
        self.eta_max = eta_max

    def __call__(self, eta: Tensor, alpha: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
        """Memory outputs (B, H, C, K) → eta and cumulative log decay, (B, H, M, C) each, both 0 unless alive (B, C)."""
        eta = self.eta_max * (eta @ self.weight[0] + self.bias[0]).sigmoid()  # (B, H, C, 1)
        log_alpha = functional.logsigmoid(alpha @ self.weight[1] + self.bias[1])
        if alive is not None:
            dead = ~alive[:, None, :, None]
            eta, log_alpha = eta.masked_fill(dead, 0), log_alpha.masked_fill(dead, 0)
        return eta.mT * self.rates, log_alpha.cumsum(-2).mT * self.rates


class Writes(NamedTuple):
    """The writes of one chunk into the matrices E of a group: E_t = e^{g_t} E + sum_{s<=t} e^{g_t - g_s} k_s p_s^T."""

    keys: Tensor  # (B, G, C, F)
    values: Tensor  # (B, G, M, C, V), p
    log_decay: Tensor  # (B, G, M, C), g, cumulative inside the chunk


def targets(own: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """v̂ (B, H, C, M, V): each memory's own output for v, unit length; the read memory learns v itself by default."""
    own = unit(own)
    return own if rule.self_values else torch.cat([own, v.unsqueeze(3)], 3)


def solve(
    k: Tensor,
    u: Tensor,
    at_rest: Tensor | None,
    read_E: Tensor,
    eta: Tensor,
    g: Tensor,
    erase: str,
    A: Tensor | None = None,
) -> Writes:
    """The writes p of a chunk: (I + L) p = eta (u - M₀ k - e^ḡ E k), L_ts = eta_t e^{ḡ_t - g_s} k_t·k_s for s < t.

    k (B, G, C, F); u, at_rest, read_E (B, G, C, M, V); eta, g (B, G, M, C). ḡ is g where the erase acts on the decayed
    memory and g before this token's decay where it acts beside it; at_rest is M₀ k, None where memories decay to zero.
    A = erasing_decays(g, erase) where a caller has it already.
    """
    u = u.transpose(2, 3)
    if erase == "none":
        return Writes(k, eta[..., None] * u, g)
    later = g if erase == "decayed" else shift(g)
    error = torch.addcmul(u, later.exp()[..., None], read_E.transpose(2, 3), value=-1)
    if at_rest is not None:
        error = error - at_rest.transpose(2, 3)
    if k.shape[2] == 1:  # nothing was written before it
        return Writes(k, eta[..., None] * error, g)
    return Writes(k, written(k, error, eta, later, g, decays(later, g) if A is None else A), g)


def erasing_decays(g: Tensor, erase: str) -> Tensor:
    """What matrices under the same gates share: the decay between two tokens, as the erase sees it."""
    return decays(g if erase == "decayed" else shift(g), g)


def commit(E: Tensor, writes: Writes) -> Tensor:
    """The matrices after the writes."""
    k, p, g = writes
    end = g[..., -1:]
    p = (end - g).exp()[..., None] * p  # (B, G, M, C, V)
    kept = (end.exp().unsqueeze(2) * E).flatten(0, 1).flatten(2)  # (B*G, F, M*V)
    grown = torch.baddbmm(kept, k.flatten(0, 1).mT, p.transpose(2, 3).flatten(0, 1).flatten(2))
    return grown.view(E.shape)


def read(f: Tensor, S: Tensor, memories: int | None = None) -> Tensor:
    """f (B, G, C, F) through the first so many matrices S (B, G, F, M, V) → (B, G, C, M, V)."""
    M, V = S.shape[-2:]
    used = M if memories is None else memories
    return (f @ S.flatten(-2)[..., : used * V]).unflatten(-1, (used, V))


def read_initial(f: Tensor, W: Tensor) -> Tensor:
    """The same through matrices W (G, F, M, V) that all rows share."""
    rows = f.transpose(0, 1).flatten(1, 2) @ W.flatten(-2)  # (G, B*C, M*V)
    return rows.unflatten(1, (len(f), -1)).transpose(0, 1).unflatten(-1, W.shape[-2:])


def read_last(q: Tensor, initial: Tensor, anchor: Tensor, running: Tensor, writes: Writes, rule: Rule) -> Tensor:
    """q (B, G, C, F) through the last matrix of each group: M_{t-1} inside the chunk, or its anchor."""
    E = (anchor if rule.read == "anchor" else running)[..., -1, :]
    if rule.read == "anchor":
        return q @ (initial[..., -1, :] + E if rule.decay_to == "initial" else E)
    y = read_written(q, E, writes.keys, writes.values[:, :, -1], writes.log_decay[:, :, -1])
    return y + q @ initial[..., -1, :] if rule.decay_to == "initial" else y


def read_written(q: Tensor, E: Tensor, k: Tensor, p: Tensor, g: Tensor) -> Tensor:
    """q_t through E_{t-1}: q, k (..., C, F), E (..., F, V), p (..., C, V), g (..., C) → (..., C, V)."""
    before = shift(g)
    return before.exp()[..., None] * (q @ E) + (decay_matrix(before, g) * (q @ k.mT)) @ p


def enter(initial: Tensor, rows: int, deviation: Tensor | None, rule: Rule) -> Tensor:
    """The part of a matrix that decays, of its deviation from the initial state."""
    if deviation is None:
        deviation = initial.new_zeros(rows, *initial.shape)
    deviation = deviation.contiguous()  # also when it comes back as the view that `leave` handed out: no copy then
    return deviation if rule.decay_to == "initial" else initial + deviation


def leave(initial: Tensor, E: Tensor, rule: Rule) -> Tensor:
    return E if rule.decay_to == "initial" else E - initial


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
