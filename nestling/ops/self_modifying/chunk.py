"""Self-modifying Titans in chunks: one Python loop over chunks, everything inside a chunk in parallel.

The generated k, v, eta, alpha and all gradients are taken at the chunk's first state S, so inside a chunk each
matrix follows a linear recurrence, solved exactly by one unit-triangular system (README.md). Letters: B batch,
H heads, C chunk length, M memories, F key width of a matrix, V its value width, G groups that share their keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.rule import Rule

Matrices = list[Tensor]  # (B, G, F, M, V) each: the matrices of one group lie side by side and read one key together


class Writes(NamedTuple):
    """The writes of one chunk into the matrices E of a group: E_t = e^{g_t} E + sum_{s<=t} e^{g_t - g_s} k_s p_s^T."""

    keys: Tensor  # (B, G, C, F)
    values: Tensor  # (B, G, M, C, V), p
    log_decay: Tensor  # (B, G, M, C), g, cumulative inside the chunk


def self_modifying(
    z: Tensor,
    q: Tensor | None,
    weights: tuple[Tensor, ...],
    gate_weight: Tensor,
    gate_bias: Tensor,
    rates: Tensor,
    *,
    rule: Rule,
    chunk_size: int,
    features: Tensor | None = None,
    state: tuple[Tensor, ...] | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Let M memories per head generate their keys, values and gates, write themselves, and be read.

    z            (B, T, H, K)  input of the generating memories; token 0 opens a chunk
    q            (B, T, H, K)  queries, or None: a memory generates them too
    weights      initial states (H, M, in, out): one (linear or feature memory) or two (2-layer MLP); M = 5, 6 without q
    gate_weight  (2, H, K), gate_bias (2, H): the slow heads of eta and alpha
    rates        (H, M)  r: a memory is written with r * eta and keeps alpha^r
    features     (H, K, F)  static first layer: M(z) = Wᵀ unit(silu(featuresᵀ z))
    state        deviations from the initial states, (B, H, M, in, out) each; None = zeros
    lengths      (B,)  real tokens per row; the rest is padding
    Returns y (B, T, H, K) and the deviations after the last chunk that each row has filled.
    Source: (83)-(93); docs/equations.md. Raises ValueError for shapes that do not fit.
    """
    _check(z, q, weights, rates, chunk_size, features)
    memories = _TwoLayer(weights, rule) if len(weights) == 2 else _OneLayer(weights[0], features, rule)
    gates = _Gates(gate_weight, gate_bias, rates, rule)
    z, q = z.transpose(1, 2), None if q is None else q.transpose(1, 2)  # (B, H, T, K)
    carried = memories.enter(z.shape[0], state)
    outputs = []
    for start in range(0, z.shape[2], chunk_size):
        here = slice(start, start + chunk_size)
        y, written = memories.chunk(z[:, :, here], None if q is None else q[:, :, here], carried, gates)
        outputs.append(y)
        if y.shape[2] == chunk_size:
            full = None if lengths is None else (lengths >= start + chunk_size).to(z.device).view(-1, 1, 1, 1, 1)
            carried = [_commit(E, w, full) for E, w in zip(carried, written, strict=True)]
    return torch.cat(outputs, 2).transpose(1, 2) if outputs else torch.zeros_like(z).transpose(1, 2), memories.leave(
        carried
    )


def _check(
    z: Tensor, q: Tensor | None, weights: tuple[Tensor, ...], rates: Tensor, chunk_size: int, features: Tensor | None
) -> None:
    memories = 6 if q is None else 5
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    if len(weights) not in (1, 2) or (len(weights) == 2 and features is not None):
        raise ValueError(f"weights holds {len(weights)} matrices per memory; use 1, or 2 without features")
    if any(w.shape[1] != memories for w in weights) or rates.shape[1] != memories:
        raise ValueError(f"weights and rates must hold {memories} memories (5, and one more where q is None)")
    width = z.shape[-1] if features is None else features.shape[-1]
    if (weights[0].shape[-2], weights[-1].shape[-1]) != (width, z.shape[-1]):
        raise ValueError(f"weights map {weights[0].shape[-2]} to {weights[-1].shape[-1]}, not {width} to {z.shape[-1]}")


class _Gates:
    """From the outputs of the eta and alpha memories to each memory's write rate and log decay."""

    def __init__(self, weight: Tensor, bias: Tensor, rates: Tensor, rule: Rule) -> None:
        self.weight = weight[..., None]  # (2, H, K, 1)
        self.bias = bias[..., None, None]  # (2, H, 1, 1)
        self.rates = rates[..., None]  # (H, M, 1)
        self.eta_max = rule.eta_max

    def __call__(self, eta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Memory outputs (B, H, C, K) → eta and cumulative log decay, (B, H, M, C) each."""
        eta = self.eta_max * (eta @ self.weight[0] + self.bias[0]).sigmoid()  # (B, H, C, 1)
        log_alpha = functional.logsigmoid(alpha @ self.weight[1] + self.bias[1]).cumsum(-2)
        return eta.mT * self.rates, log_alpha.mT * self.rates


class _OneLayer:
    """M(z) = Wᵀ φ(z), φ fixed: all memories of a head are one group."""

    def __init__(self, weight: Tensor, features: Tensor | None, rule: Rule) -> None:
        self.initial, self.features, self.rule = weight.transpose(1, 2), features, rule

    def enter(self, rows: int, state: tuple[Tensor, ...] | None) -> Matrices:
        return [_enter(self.initial, rows, None if state is None else state[0].transpose(2, 3), self.rule)]

    def leave(self, carried: Matrices) -> tuple[Tensor, ...]:
        return (_leave(self.initial, carried[0], self.rule).transpose(2, 3),)

    def phi(self, z: Tensor) -> Tensor:
        return z if self.features is None else _unit(functional.silu(z @ self.features))

    def chunk(self, z: Tensor, q: Tensor | None, carried: Matrices, gates: _Gates) -> tuple[Tensor, list[Writes]]:
        rule, E = self.rule, carried[0]
        S = self.initial + E if rule.decay_to == "initial" else E
        generators, _ = S.split([S.shape[-2] - 1, 1], -2)
        made = _read(self.phi(z), generators).unbind(-2)  # (B, H, C, V) each: k, v, eta, alpha (, q)
        eta, g = gates(made[2], made[3])
        k, v = self.phi(_unit(made[0])), _unit(made[1])
        u = _targets(_read(self.phi(v), S if rule.self_values else generators), v, rule)
        read_S = _read(k, S)
        if rule.objective == "l2":
            u = u - read_S
        written = _solve(k, u, read_S, _read(k, E), eta, g, rule, rule.erase)
        q = self.phi(_unit(made[4]) if q is None else q)
        return _read_last(q, self.initial, E, written, rule), [written]


class _TwoLayer:
    """M(z) = z + W₂ᵀ silu(W₁ᵀ z): the first matrices of a head share the key, each second matrix has its own."""

    def __init__(self, weights: tuple[Tensor, ...], rule: Rule) -> None:
        self.first = weights[0].transpose(1, 2)  # (H, K, M, F)
        self.second = weights[1].flatten(0, 1).unsqueeze(2)  # (H*M, F, 1, V)
        self.memories, self.rule = weights[0].shape[1], rule

    def enter(self, rows: int, state: tuple[Tensor, ...] | None) -> Matrices:
        first, second = (
            (None, None) if state is None else (state[0].transpose(2, 3), state[1].flatten(1, 2)[:, :, :, None])
        )
        return [_enter(self.first, rows, first, self.rule), _enter(self.second, rows, second, self.rule)]

    def leave(self, carried: Matrices) -> tuple[Tensor, ...]:
        first, second = (_leave(w, E, self.rule) for w, E in zip((self.first, self.second), carried, strict=True))
        return first.transpose(2, 3), second.squeeze(3).unflatten(1, (-1, self.memories))

    def chunk(self, z: Tensor, q: Tensor | None, carried: Matrices, gates: _Gates) -> tuple[Tensor, list[Writes]]:
        rule, (E1, E2) = self.rule, carried
        rest = rule.decay_to == "initial"
        S1, S2 = (self.first + E1, self.second + E2) if rest else (E1, E2)
        S2 = S2.squeeze(3).unflatten(1, (-1, self.memories))  # (B, H, M, F, V)
        made, _ = _forward(z, S1[..., :-1, :], S2[:, :, :-1])  # (B, H, M-1, C, V)
        eta, g = gates(made[:, :, 2], made[:, :, 3])
        k, v = _unit(made[:, :, 0]), _unit(made[:, :, 1])
        known = slice(None) if rule.self_values else slice(-1)
        own, _ = _forward(v, S1[..., known, :], S2[:, :, known])
        u = _targets(own.transpose(2, 3), v, rule)  # (B, H, C, M, V)
        out, a = _forward(k, S1, S2)
        if rule.objective == "l2":
            u = u - out.transpose(2, 3)
        u = u.transpose(2, 3)
        h, s = functional.silu(a), a.sigmoid()
        back = (u @ S2.mT) * (s * (1 + a * (1 - s)))  # (B, H, M, C, F)
        first = _solve(k, back.transpose(2, 3), _read(k, S1), _read(k, E1), eta, g, rule, rule.erase)
        h, u, eta2 = h.flatten(1, 2), u.flatten(1, 2).unsqueeze(3), eta.flatten(1, 2).unsqueeze(2)
        if rule.erase_hidden:
            eta2 = eta2 / (1 + eta2 * h.square().sum(-1)[:, :, None])
        read_S = _read(h, S2.flatten(1, 2).unsqueeze(3))
        erase = rule.erase if rule.erase_hidden else "none"
        second = _solve(h, u, read_S, _read(h, E2), eta2, g.flatten(1, 2).unsqueeze(2), rule, erase)
        q = _unit(made[:, :, 4]) if q is None else q
        hidden = functional.silu(_read_last(q, self.first, E1, first, rule))
        last = slice(self.memories - 1, None, self.memories)
        mine = Writes(second.keys[:, last], second.values[:, last], second.log_decay[:, last])
        y = q + _read_last(hidden, self.second[last], E2[:, last], mine, rule)
        return y, [first, second]


def _enter(initial: Tensor, rows: int, deviation: Tensor | None, rule: Rule) -> Tensor:
    """What the loop carries: the part of a matrix that decays."""
    if deviation is None:
        deviation = initial.new_zeros(rows, *initial.shape)
    return deviation if rule.decay_to == "initial" else initial + deviation


def _leave(initial: Tensor, carried: Tensor, rule: Rule) -> Tensor:
    return carried if rule.decay_to == "initial" else carried - initial


def _read(f: Tensor, S: Tensor) -> Tensor:
    """f (B, G, C, F) through the matrices S (B, G, F, M, V) → (B, G, C, M, V)."""
    return (f @ S.flatten(-2)).unflatten(-1, S.shape[-2:])


def _forward(z: Tensor, S1: Tensor, S2: Tensor) -> tuple[Tensor, Tensor]:
    """z (B, H, C, K) through 2-layer memories → outputs (B, H, M, C, V), pre-activations (B, H, M, C, F)."""
    a = _read(z, S1).transpose(2, 3)
    return z.unsqueeze(2) + functional.silu(a) @ S2, a


def _targets(own: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """v̂ (B, H, C, M, V): each memory's own output for v, unit length; the read memory learns v itself by default."""
    own = _unit(own)
    return own if rule.self_values else torch.cat([own, v.unsqueeze(3)], 3)


def _solve(
    k: Tensor, u: Tensor, read_S: Tensor, read_E: Tensor, eta: Tensor, g: Tensor, rule: Rule, erase: str
) -> Writes:
    """The writes p of a chunk: (I + L) p = eta (u - M₀ k - e^ḡ E k), L_ts = eta_t e^{ḡ_t - g_s} k_t·k_s for s < t.

    k (B, G, C, F); u, read_S, read_E (B, G, C, M, V); eta, g (B, G, M, C). ḡ is g where the erase acts on the decayed
    memory and g before this token's decay where it acts beside it; M₀ k is absent where memories decay to zero.
    """
    u, eta_t = u.transpose(2, 3), eta[..., None]
    if erase == "none":
        return Writes(k, eta_t * u, g)
    decay = g if erase == "decayed" else _shift(g)
    kept = decay.exp()[..., None] * read_E.transpose(2, 3)
    if rule.decay_to == "initial":
        kept = kept + (read_S - read_E).transpose(2, 3)
    L = _decay_matrix(decay, g) * eta_t * (k @ k.mT).unsqueeze(2)
    p = torch.linalg.solve_triangular(L, eta_t * (u - kept), upper=False, unitriangular=True)
    return Writes(k, p, g)


def _commit(E: Tensor, written: Writes, full: Tensor | None) -> Tensor:
    """The matrices after the chunk, in the rows that filled it."""
    k, p, g = written
    end = g[..., -1:]
    p = (end - g).exp()[..., None] * p  # (B, G, M, C, V)
    grown = (k.mT @ p.transpose(2, 3).flatten(-2)).unflatten(-1, E.shape[-2:])
    new = end.exp().unsqueeze(2) * E + grown
    return new if full is None else torch.where(full, new, E)


def _read_last(q: Tensor, initial: Tensor, E: Tensor, written: Writes, rule: Rule) -> Tensor:
    """q (B, G, C, F) through the last matrix of each group: M_{t-1} inside the chunk, or its first state."""
    E = E[..., -1, :]
    if rule.read == "anchor":
        return q @ (initial[..., -1, :] + E if rule.decay_to == "initial" else E)
    g, p = written.log_decay[:, :, -1], written.values[:, :, -1]
    before = _shift(g)
    y = before.exp()[..., None] * (q @ E) + (_decay_matrix(before, g) * (q @ written.keys.mT)) @ p
    return y + q @ initial[..., -1, :] if rule.decay_to == "initial" else y


def _shift(g: Tensor) -> Tensor:
    """Cumulative log decay before each token's own."""
    return functional.pad(g[..., :-1], (1, 0))


def _decay_matrix(later: Tensor, g: Tensor) -> Tensor:
    """e^{later_t - g_s} for s < t, else 0; (..., C) → (..., C, C). Only differences <= 0 are exponentiated."""
    C = g.shape[-1]
    unseen = torch.ones(C, C, dtype=torch.bool, device=g.device).triu()
    return (later[..., :, None] - g[..., None, :]).masked_fill(unseen, -torch.inf).exp()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
