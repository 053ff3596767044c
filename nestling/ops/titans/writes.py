"""What one part of a chunk consists of: its writes, the reads between them, the matrices after them (README.md).

What does not need the matrices is prepared for all chunks together; `advance` is what remains along the loop. A matrix
M and its surprise S are the states of one linear system. Letters: R rows times heads, C tokens of the part, F input
width of a matrix, V its output width, S number of states: 2, or 1 without momentum.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.chunks import decay_matrix

Matrices = list[Tensor]  # (R, F, V) each
Write = tuple[Tensor, Tensor]  # keys (R, C, F) and values (R, C, V) of one matrix


class Part(NamedTuple):
    """One part of a chunk, or N of them with N in front of every shape."""

    q: Tensor  # (R, C, K)
    k: Tensor
    error: Tensor  # (R, C, K) v - M(k) for a memory whose matrices are zero
    eta: Tensor  # (R, C, 1)
    reach: Tensor  # (R, S, C, 1) of the first states, in M_t
    found: Tensor  # (R, C, C) c_ts, of write s in M_t
    last: Tensor  # (R, S, C, 1) of write s, in the last states
    transfer: Tensor  # (R, S, S, 1, 1) of the first states (second S) in the last ones
    scores: Tensor  # (R, C, C) c_ts q_t.k_s
    square: Tensor | None  # (R, C, 1) |k|^2 where write rates are normalized, else None
    q_rest: Tensor | None  # (R, C, V) q and k through what does not decay of the first matrix
    k_rest: Tensor | None

    def unbind(self) -> Iterator[Part]:
        fields: list[Any] = [repeat(None) if x is None else x.unbind() for x in self]
        return (Part(*each) for each in zip(*fields, strict=False))


def prepare(
    tokens: list[Any], rest: Matrices | None, residual: bool, normalized: bool, alive: Tensor | None = None
) -> Part:
    """q, k, v (..., R, C, K), eta, log decay and log momentum or None (..., R, C) -> Part. alive (R, C)."""
    q, k, v, eta, log_decay, log_momentum = tokens
    reach, found, last, transfer = decays(log_decay, log_momentum, alive)
    q_rest, k_rest = (None if rest is None else torch.einsum("...rcf,rfv->...rcv", x, rest[0]) for x in (q, k))
    error = v - k if residual else v
    square = k.square().sum(-1, keepdim=True) if normalized else None
    return Part(q, k, error, eta[..., None], reach, found, last, transfer, found * (q @ k.mT), square, q_rest, k_rest)


def decays(
    log_decay: Tensor, log_momentum: Tensor | None, alive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reach, found, last and transfer of a Part, from gates (..., C).

    M_t = A_t M_0 + sum_{s<=t} A_t/A_s S_s and S_s = H_s S_0 + sum_{r<=s} H_s/H_r w_r, so c = (A_t/A_s)(H_s/H_r).
    Tokens that are not alive pass S on without adding it to M.
    """
    g = log_decay.cumsum(-1)
    A, kept = decay_matrix(g), g.exp()
    if log_momentum is None:
        return kept[..., None, :, None], A, A[..., None, -1, :, None], kept[..., None, None, -1:, None]
    m = log_momentum.cumsum(-1)
    if alive is not None:
        A = A * alive[..., None, :]
    H, echo = decay_matrix(m), m.exp()
    reach, found = torch.stack([kept, (A @ echo[..., None])[..., 0]], -2), A @ H
    last = torch.stack([found[..., -1, :], H[..., -1, :]], -2)
    end = torch.stack([torch.zeros_like(echo[..., -1]), echo[..., -1]], -1)
    transfer = torch.stack([reach[..., -1], end], -2)
    return reach[..., None], found, last[..., None], transfer[..., None, None]


def advance(part: Part, rest: Matrices | None, anchor: Matrices, running: Matrices) -> tuple[Tensor, Matrices]:
    """Read and write one part: y (R, C, K) and the new running.

    rest: what does not decay of each matrix, None = nothing. anchor: what decays, at the last chunk border, where the
    gradients are taken. running: what decays before the first token, then, with momentum, the surprise of each matrix.
    """
    writes = written(part, rest, anchor)
    return read_memory(part, rest, running, writes), commit_memory(part, running, writes)


def written(part: Part, rest: Matrices | None, anchor: Matrices) -> list[Write]:
    """For each matrix the keys and values whose products it grows by: -eta times the gradient of 1/2 |M(k) - v|^2."""
    a = plus(part.k_rest, part.k, anchor[0])
    if len(anchor) == 1:
        rate = part.eta if part.square is None else part.eta / damping(part.square)
        return [(part.k, rate * (part.error - a))]
    s = a.sigmoid()
    h = a * s
    W = anchor[1] if rest is None else rest[1] + anchor[1]
    error = part.error - h @ W
    back = (error @ W.mT) * (s + h * (1 - s))
    rate = part.eta
    if part.square is not None:
        share = square(back) / square(error).clamp_min(torch.finfo(error.dtype).tiny)
        rate = rate / damping(square(h) + part.square * share)
    return [(part.k, rate * back), (h, rate * error)]


def damping(curvature: Tensor) -> Tensor:
    """By what a write rate is divided: half the curvature |gradient|^2 / |error|^2 of the token's loss, at least 1."""
    return (curvature / 2).clamp_min(1)


def square(x: Tensor) -> Tensor:
    """|x|^2 along the last axis, which stays."""
    return x.square().sum(-1, keepdim=True)


def read_memory(part: Part, rest: Matrices | None, running: Matrices, writes: list[Write]) -> Tensor:
    """y_t = M_t(q_t)."""
    (_, values), layers = writes[0], len(writes)
    z = read(part.q_rest, part.q, part.scores, values, running[::layers], part)
    if layers == 1:
        return z
    z, (h, out) = functional.silu(z), writes[1]
    y = part.q if rest is None else torch.baddbmm(part.q, z, rest[1])
    return read(y, z, part.found * (z @ h.mT), out, running[1::2], part)


def commit_memory(part: Part, running: Matrices, writes: list[Write]) -> Matrices:
    """Running after the part's last token."""
    layers = len(writes)
    after = [commit(running[i::layers], *write, part) for i, write in enumerate(writes)]
    return [x for same in zip(*after, strict=True) for x in same]


def read(base: Tensor | None, f: Tensor, scores: Tensor, values: Tensor, state: Matrices, part: Part) -> Tensor:
    """base + f_t through what decays of a matrix, as it is at t: (R, C, F) -> (R, C, V)."""
    y = base
    for reach, M in zip(part.reach.unbind(1), state, strict=True):
        y = plus(y, reach * f, M)
    return plus(y, scores, values)


def commit(state: Matrices, keys: Tensor, values: Tensor, part: Part) -> Matrices:
    """The states of a matrix after the part's last token."""
    kept, new = part.transfer, [torch.bmm((last * keys).mT, values) for last in part.last.unbind(1)]
    M = torch.addcmul(new[0], kept[:, 0, 0], state[0])
    if len(state) == 1:
        return [M]
    return [torch.addcmul(M, kept[:, 0, 1], state[1]), torch.addcmul(new[1], kept[:, 1, 1], state[1])]


def plus(base: Tensor | None, x: Tensor, M: Tensor) -> Tensor:
    """base + x M, batch by batch."""
    return torch.bmm(x, M) if base is None else torch.baddbmm(base, x, M)
