"""Self-modifying Titans in chunks: one Python loop over chunks, everything inside a chunk in parallel.

The generated k, v, eta, alpha and all gradients are taken at the chunk's first state S, so inside a chunk each
matrix follows a linear recurrence, solved exactly by one unit-triangular system (README.md). Letters: B batch,
H heads, C chunk length, M memories, F key width of a matrix, V its value width, G groups that share their keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.fused import write_chunks
from nestling.ops.self_modifying.rule import Rule
from nestling.ops.self_modifying.writes import Writes, commit, read_last, read_written, solve, unit

Matrices = list[Tensor]  # (B, G, F, M, V) each: the matrices of one group lie side by side and read one key together


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
    y, carried = memories.run(z, q, memories.enter(z.shape[0], state), gates, chunk_size, lengths)
    return y.transpose(1, 2), memories.leave(carried)


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
        self.tensors = weight, bias, rates
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

    def run(
        self, z: Tensor, q: Tensor | None, carried: Matrices, gates: _Gates, chunk_size: int, lengths: Tensor | None
    ) -> tuple[Tensor, Matrices]:
        """All chunks; under the default rule the whole ones through the backward pass that is written out."""
        whole = z.shape[2] // chunk_size * chunk_size
        learning = torch.is_grad_enabled() and (z.requires_grad or self.initial.requires_grad)
        if not learning or not whole or q is None or self.rule != Rule(eta_max=self.rule.eta_max):
            return _loop(self, z, q, carried, gates, chunk_size, lengths)
        full = _full(lengths, whole, chunk_size, z.device)
        tensors = (self.phi(z[:, :, :whole]), self.initial, self.features, *gates.tensors, carried[0])
        keys, values, g, E, final = write_chunks(self.record, full, chunk_size, self.rule.eta_max, *tensors)
        queries = self.phi(q[:, :, :whole])
        y = read_written(queries.unflatten(2, (-1, chunk_size)), E, keys, values, g).flatten(2, 3)
        y = y + queries @ self.initial[..., -1, :]
        rest, carried = _loop(self, z[:, :, whole:], q[:, :, whole:], [final], gates, chunk_size, None)
        return torch.cat([y, rest], 2), carried

    def record(
        self, full: Tensor | None, chunk_size: int, eta_max: float, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `write_chunks` returns, by the loop."""
        phi_z, initial, features, gate_weight, gate_bias, rates, E = tensors
        memories = _OneLayer(initial.transpose(1, 2), features, self.rule)
        gates = _Gates(gate_weight, gate_bias, rates, self.rule)
        rows = []
        for i, z in enumerate(phi_z.split(chunk_size, 2)):
            written, _ = memories.write(z, E, gates)
            rows.append((written.keys, written.values[:, :, -1], written.log_decay[:, :, -1], E[..., -1, :]))
            E = commit(E, written, None if full is None else full[i].view(-1, 1, 1, 1, 1))
        keys, values, g, starts = (torch.stack(x, 2) for x in zip(*rows, strict=True))
        return keys, values, g, starts, E

    def phi(self, z: Tensor) -> Tensor:
        return z if self.features is None else unit(functional.silu(z @ self.features))

    def write(self, phi_z: Tensor, E: Tensor, gates: _Gates) -> tuple[Writes, list[Tensor]]:
        """The writes of one chunk, and what each memory but the last made of z: k, v, eta, alpha (, q)."""
        rule = self.rule
        S = self.initial + E if rule.decay_to == "initial" else E
        generators, _ = S.split([S.shape[-2] - 1, 1], -2)
        made = _read(phi_z, generators).unbind(-2)  # (B, H, C, V) each
        eta, g = gates(made[2], made[3])
        k, v = self.phi(unit(made[0])), unit(made[1])
        u = _targets(_read(self.phi(v), S if rule.self_values else generators), v, rule)
        read_S = _read(k, S)
        if rule.objective == "l2":
            u = u - read_S
        return solve(k, u, read_S, _read(k, E), eta, g, rule, rule.erase), list(made)

    def chunk(self, z: Tensor, q: Tensor | None, carried: Matrices, gates: _Gates) -> tuple[Tensor, list[Writes]]:
        written, made = self.write(self.phi(z), carried[0], gates)
        q = self.phi(unit(made[4]) if q is None else q)
        return read_last(q, self.initial, carried[0], written, self.rule), [written]


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

    def run(
        self, z: Tensor, q: Tensor | None, carried: Matrices, gates: _Gates, chunk_size: int, lengths: Tensor | None
    ) -> tuple[Tensor, Matrices]:
        return _loop(self, z, q, carried, gates, chunk_size, lengths)

    def chunk(self, z: Tensor, q: Tensor | None, carried: Matrices, gates: _Gates) -> tuple[Tensor, list[Writes]]:
        rule, (E1, E2) = self.rule, carried
        rest = rule.decay_to == "initial"
        S1, S2 = (self.first + E1, self.second + E2) if rest else (E1, E2)
        S2 = S2.squeeze(3).unflatten(1, (-1, self.memories))  # (B, H, M, F, V)
        made, _ = _forward(z, S1[..., :-1, :], S2[:, :, :-1])  # (B, H, M-1, C, V)
        eta, g = gates(made[:, :, 2], made[:, :, 3])
        k, v = unit(made[:, :, 0]), unit(made[:, :, 1])
        known = slice(None) if rule.self_values else slice(-1)
        own, _ = _forward(v, S1[..., known, :], S2[:, :, known])
        u = _targets(own.transpose(2, 3), v, rule)  # (B, H, C, M, V)
        out, a = _forward(k, S1, S2)
        if rule.objective == "l2":
            u = u - out.transpose(2, 3)
        u = u.transpose(2, 3)
        h, s = functional.silu(a), a.sigmoid()
        back = (u @ S2.mT) * (s * (1 + a * (1 - s)))  # (B, H, M, C, F)
        first = solve(k, back.transpose(2, 3), _read(k, S1), _read(k, E1), eta, g, rule, rule.erase)
        h, u, eta2 = h.flatten(1, 2), u.flatten(1, 2).unsqueeze(3), eta.flatten(1, 2).unsqueeze(2)
        if rule.erase_hidden:
            eta2 = eta2 / (1 + eta2 * h.square().sum(-1)[:, :, None])
        read_S = _read(h, S2.flatten(1, 2).unsqueeze(3))
        erase = rule.erase if rule.erase_hidden else "none"
        second = solve(h, u, read_S, _read(h, E2), eta2, g.flatten(1, 2).unsqueeze(2), rule, erase)
        q = unit(made[:, :, 4]) if q is None else q
        hidden = functional.silu(read_last(q, self.first, E1, first, rule))
        last = slice(self.memories - 1, None, self.memories)
        mine = Writes(second.keys[:, last], second.values[:, last], second.log_decay[:, last])
        y = q + read_last(hidden, self.second[last], E2[:, last], mine, rule)
        return y, [first, second]


def _loop(
    memories: _OneLayer | _TwoLayer,
    z: Tensor,
    q: Tensor | None,
    carried: Matrices,
    gates: _Gates,
    chunk_size: int,
    lengths: Tensor | None,
) -> tuple[Tensor, Matrices]:
    """Chunk by chunk: read, and commit what was written where the chunk is full."""
    outputs = []
    full = _full(lengths, z.shape[2], chunk_size, z.device)
    for i, start in enumerate(range(0, z.shape[2], chunk_size)):
        here = slice(start, start + chunk_size)
        y, written = memories.chunk(z[:, :, here], None if q is None else q[:, :, here], carried, gates)
        outputs.append(y)
        if y.shape[2] == chunk_size:
            rows = None if full is None else full[i].view(-1, 1, 1, 1, 1)
            carried = [commit(E, w, rows) for E, w in zip(carried, written, strict=True)]
    return torch.cat(outputs, 2) if outputs else torch.zeros_like(z), carried


def _full(lengths: Tensor | None, tokens: int, chunk_size: int, device: torch.device) -> Tensor | None:
    """(N, B): the rows that fill each whole chunk, None where all do."""
    if lengths is None:
        return None
    ends = torch.arange(1, tokens // chunk_size + 1, device=device) * chunk_size
    return lengths.to(device) >= ends[:, None]


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
    own = unit(own)
    return own if rule.self_values else torch.cat([own, v.unsqueeze(3)], 3)
