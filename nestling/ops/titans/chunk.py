"""Titans in chunks: one Python loop over chunks, everything inside a chunk in parallel (README.md).

All gradients of a chunk are taken at its first state, so each is an outer product f_s e_s^T of a matrix's input and
the error at its output, and momentum and forgetting are linear: what token t finds of the write of token s is one
number, c_ts. Letters: B batch, H heads, C chunk length, F the input width of a matrix, V its output width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.titans.reference import check


class Carry(NamedTuple):
    """One matrix between chunks."""

    rest: Tensor  # (H, F, V), the part that does not decay: the initial weight, or nothing (then zeros)
    moving: Tensor  # (B, H, F, V), the part that decays; the matrix is rest + moving
    surprise: Tensor | None  # (B, H, F, V), S


class Decays(NamedTuple):
    """What is left of earlier things inside one chunk; (B, H, C, ...)."""

    moving: Tensor  # (B, H, C, 1) of the first state, at t
    surprise: Tensor | None  # (B, H, C, 1) of the first S in M_t: sum over its echoes
    writes: Tensor  # (B, H, C, C) c_ts: of write s in M_t
    echo_start: Tensor | None  # (B, H, 1, 1) of the first S in the last S
    echo: Tensor | None  # (B, H, C, 1) of write s in the last S


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    *,
    weights: tuple[Tensor, ...],
    state: tuple[Tensor, ...] | None = None,
    chunk_size: int = 64,
    decay_to: Literal["zero", "initial"] = "zero",
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same numbers as reference.titans at the same chunk_size; arguments and results as there."""
    check(k, weights, state, log_momentum is not None, chunk_size, decay_to)
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        tokens = [x.to(dtype).transpose(1, 2) for x in (q, k, v, eta)]  # (B, H, T, ...)
        decays = [None if x is None else x.to(dtype).transpose(1, 2) for x in (log_decay, log_momentum)]
        carried = _enter(weights, state, len(v), dtype, log_momentum is not None, decay_to)
        outputs = []
        for start in range(0, v.shape[1], chunk_size):
            here = slice(start, start + chunk_size)
            full = None if lengths is None else (lengths >= start + chunk_size).to(v.device).view(-1, 1, 1, 1)
            decay, momentum = (None if x is None else x[:, :, here] for x in decays)
            y, after = _chunk([x[:, :, here] for x in tokens], decay, momentum, carried)
            outputs.append(y)
            if y.shape[2] == chunk_size:
                carried = after if full is None else [_where(full, a, b) for a, b in zip(after, carried, strict=True)]
        y = torch.cat(outputs, 2).transpose(1, 2).to(v.dtype) if outputs else v
        return y, _leave(weights, carried)


def _enter(
    weights: tuple[Tensor, ...],
    state: tuple[Tensor, ...] | None,
    rows: int,
    dtype: torch.dtype,
    momentum: bool,
    decay_to: str,
) -> list[Carry]:
    carried = []
    for i, w in enumerate(weights):
        w = w.to(dtype)
        zero = w.new_zeros(rows, *w.shape)
        deviation = zero if state is None else state[i].to(dtype)
        surprise = zero if state is None or not momentum else state[len(weights) + i].to(dtype)
        rest, moving = (w, deviation) if decay_to == "initial" else (torch.zeros_like(w), w + deviation)
        carried.append(Carry(rest, moving, surprise if momentum else None))
    return carried


def _leave(weights: tuple[Tensor, ...], carried: list[Carry]) -> tuple[Tensor, ...]:
    deviation = [c.moving + (c.rest - w.to(c.rest.dtype)) for w, c in zip(weights, carried, strict=True)]
    return (*deviation, *(c.surprise for c in carried if c.surprise is not None))


def _chunk(
    tokens: list[Tensor], log_decay: Tensor | None, log_momentum: Tensor | None, carried: list[Carry]
) -> tuple[Tensor, list[Carry]]:
    """One chunk, (B, H, C, ...): read every token, and what the matrices are after the last one."""
    q, k, v, eta = tokens
    decays = _decays(eta, log_decay, log_momentum)
    eta = eta[..., None]
    if len(carried) == 1:
        error = k @ (carried[0].rest + carried[0].moving) - v
        written = -eta * error
        return _read(q, k, written, carried[0], decays), [_commit(k, written, carried[0], decays)]
    first, second = carried
    W1 = second.rest + second.moving
    a = k @ (first.rest + first.moving)
    h, s = functional.silu(a), a.sigmoid()
    out = -eta * (k + h @ W1 - v)
    back = (out @ W1.mT) * (s * (1 + a * (1 - s)))
    hidden = functional.silu(_read(q, k, back, first, decays))
    y = q + _read(hidden, h, out, second, decays)
    return y, [_commit(k, back, first, decays), _commit(h, out, second, decays)]


def _decays(like: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None) -> Decays:
    """M_t = A_t M_0 + sum_{s<=t} A_t/A_s S_s and S_s = H_s S_0 + sum_{r<=s} H_s/H_r w_r, so c = (A_t/A_s)(H_s/H_r)."""
    g = torch.zeros_like(like) if log_decay is None else log_decay.cumsum(-1)
    A = _decay_matrix(g)
    if log_momentum is None:
        return Decays(g.exp()[..., None], None, A, None, None)
    m = log_momentum.cumsum(-1)
    H = _decay_matrix(m)
    from_start = m.exp()[..., None]
    return Decays(g.exp()[..., None], A @ from_start, A @ H, from_start[..., -1:, :], H[..., -1, :, None])


def _read(f: Tensor, keys: Tensor, written: Tensor, carry: Carry, decays: Decays) -> Tensor:
    """f_t through the matrix as it is at t: (B, H, C, F) -> (B, H, C, V)."""
    y = f @ carry.rest + decays.moving * (f @ carry.moving) + (decays.writes * (f @ keys.mT)) @ written
    if carry.surprise is None or decays.surprise is None:
        return y
    return y + decays.surprise * (f @ carry.surprise)


def _commit(keys: Tensor, written: Tensor, carry: Carry, decays: Decays) -> Carry:
    """The matrix and its surprise after the chunk's last token."""
    moving = decays.moving[..., -1:, :] * carry.moving + (decays.writes[..., -1, :, None] * keys).mT @ written
    if carry.surprise is None or decays.surprise is None or decays.echo is None or decays.echo_start is None:
        return carry._replace(moving=moving)
    moving = moving + decays.surprise[..., -1:, :] * carry.surprise
    surprise = decays.echo_start * carry.surprise + (decays.echo * keys).mT @ written
    return Carry(carry.rest, moving, surprise)


def _where(mask: Tensor, a: Carry, b: Carry) -> Carry:
    """a in the rows where mask, else b."""
    surprise = None if a.surprise is None or b.surprise is None else torch.where(mask, a.surprise, b.surprise)
    return Carry(a.rest, torch.where(mask, a.moving, b.moving), surprise)


def _decay_matrix(g: Tensor) -> Tensor:
    """exp(g_t - g_s) for s <= t, else 0: (..., C) -> (..., C, C). Only differences <= 0 are exponentiated."""
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    return (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp()
