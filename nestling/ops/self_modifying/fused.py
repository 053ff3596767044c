"""The default rule's writes with their backward pass written out: half the time and memory of recorded autograd.

`write_chunks` is what one_layer.py's loop computes under Rule() (dot product, decayed erase, decay to the initial
state, given values): the same equations in the same order. Second derivatives go through that loop.
n = B*H, C chunk length, F key width, M = 5 memories, V value width; GEN = (M-1)*V columns belong to the generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nestling.ops.self_modifying.features import scale, unit_backward
from nestling.ops.self_modifying.replay import differentiable
from nestling.ops.self_modifying.writes import decay_matrix

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Parameters(NamedTuple):
    """Everything constant over the sequence, one copy per row and head."""

    weight: Tensor  # (n, F, M*V) initial states
    features: Tensor | None  # (n, K, F)
    gate_weight: Tensor  # (2, n, V, 1)
    gate_bias: Tensor  # (2, n, 1)
    rates: Tensor  # (n, M)


class Saved(NamedTuple):
    """What one chunk's backward needs beside its inputs."""

    E: Tensor  # (n, F, M*V) state at the chunk's start
    made: Tensor  # (n, C, M-1, V) raw k, v, eta, alpha
    kv: Tensor  # (n, C, 2, V) unit k and v
    kv_scale: Tensor  # (n, C, 2, 1)
    a: Tensor  # (n, C, 2, F) before silu (features)
    f: Tensor  # (n, C, 2, F) φ(k), φ(v)
    f_scale: Tensor  # (n, C, 2, 1)
    target: Tensor  # (n, C, M, V)
    target_scale: Tensor  # (n, C, M-1, 1)
    read_E: Tensor  # (n, C, M, V)
    error: Tensor  # (n, C, M, V) target - M_0 k - e^g E k
    x: Tensor  # (2, n, C) gate logits
    A: Tensor  # (n, M, C, C) decay between two tokens
    p: Tensor  # (n, M, C, V)


def write_chunks(
    plain: Callable[..., Results], full: Tensor | None, chunk_size: int, eta_max: float, *tensors: Tensor | None
) -> Results:
    """The writes of whole chunks.

    `plain` is the differentiable loop; full (N, B) says which rows commit which chunk (None = all). The tensors are
    z (B, H, N*C, F) as features, weight (H, F, M, V), features (H, K, F) or None, gate_weight (2, H, V),
    gate_bias (2, H), rates (H, M), E (B, H, F, M, V). Returns for the read memory keys (B, H, N, C, F), values
    (B, H, N, C, V), cumulative log decay (B, H, N, C), E at chunk starts (B, H, N, F, V); and the final E of all.
    """
    return _WriteChunks.apply(plain, full, chunk_size, eta_max, *tensors)


class _WriteChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plain: Callable, full: Tensor | None, C: int, eta_max: float, *tensors: Tensor | None
    ) -> Results:
        z, E = tensors[0], tensors[-1]
        assert z is not None and E is not None
        B, H, T, _ = z.shape
        parameters = _per_row(B, *tensors[1:-1])
        chunks = z.reshape(B * H, T // C, C, -1).unbind(1)
        E = E.reshape(B * H, E.shape[2], -1)
        saved, rates = [], parameters.rates
        for i, chunk in enumerate(chunks):
            new, intermediates = _forward(chunk, E, parameters, eta_max)
            saved.append(intermediates)
            E = new if full is None else torch.where(_rows(full[i], H), new, E)
        ctx.options = plain, full, C, eta_max, len(tensors)
        ctx.save_for_backward(*tensors, *(x for s in saved for x in s))
        V = saved[0].p.shape[-1]
        keys = torch.stack([s.f[:, :, 0] for s in saved], 1)
        values = torch.stack([s.p[:, -1] for s in saved], 1)
        decay = torch.stack([functional.logsigmoid(s.x[1]).cumsum(-1) * rates[:, -1:] for s in saved], 1)
        starts = torch.stack([s.E[..., -V:] for s in saved], 1)
        per_head = (x.unflatten(0, (B, H)) for x in (keys, values, decay, starts, E.unflatten(-1, (-1, V))))
        return tuple(per_head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plain, full, C, eta_max, given = ctx.options
        tensors, rest = ctx.saved_tensors[:given], ctx.saved_tensors[given:]
        if torch.is_grad_enabled():
            return (None,) * 4 + differentiable(plain, (full, C, eta_max), tensors, grads)
        z, weight, features = tensors[:3]
        B, H, T, _ = z.shape
        width = len(Saved._fields)
        saved = [Saved(*rest[i : i + width]) for i in range(0, len(rest), width)]
        parameters = _per_row(B, *tensors[1:-1])
        total = _per_row(B, *(None if t is None else torch.zeros_like(t) for t in tensors[1:-1]))
        keys, values, decay, starts, dE = (g.flatten(0, 1) for g in grads)
        dE = dE.flatten(-2)
        dz = z.new_zeros(B * H, T // C, C, z.shape[-1])
        chunks = z.reshape(dz.shape).unbind(1)
        for i in reversed(range(len(saved))):
            direct = None if full is None else torch.where(_rows(full[i], H), 0, dE)
            dE = dE if direct is None else dE - direct
            outer = (keys[:, i], values[:, i], decay[:, i], starts[:, i])
            dz[:, i], dE = _backward(chunks[i], saved[i], parameters, eta_max, total, dE, outer)
            dE = dE if direct is None else dE + direct
        return None, None, None, None, *_collect(z, weight, features, total, dz, dE, tensors[-1], B, H)


def _rows(full: Tensor, heads: int) -> Tensor:
    return full.repeat_interleave(heads).view(-1, 1, 1)


def _per_row(B: int, *tensors: Tensor | None) -> Parameters:
    """(weight, features, gate_weight, gate_bias, rates) repeated for every row."""
    weight, features, gate_weight, gate_bias, rates = tensors
    assert weight is not None and gate_weight is not None and gate_bias is not None and rates is not None
    return Parameters(
        weight.flatten(-2).repeat(B, 1, 1),
        None if features is None else features.repeat(B, 1, 1),
        gate_weight.repeat(1, B, 1)[..., None],
        gate_bias.repeat(1, B)[..., None],
        rates.repeat(B, 1),
    )


def _collect(
    z: Tensor,
    weight: Tensor,
    features: Tensor | None,
    total: Parameters,
    dz: Tensor,
    dE: Tensor,
    E: Tensor,
    B: int,
    H: int,
) -> tuple[Tensor | None, ...]:
    """Sum the rows' parameter gradients and restore the shapes."""
    return (
        dz.view(z.shape),
        total.weight.unflatten(0, (B, H)).sum(0).view(weight.shape),
        None if total.features is None else total.features.unflatten(0, (B, H)).sum(0),
        total.gate_weight[..., 0].unflatten(1, (B, H)).sum(1),
        total.gate_bias[..., 0].unflatten(1, (B, H)).sum(1),
        total.rates.unflatten(0, (B, H)).sum(0),
        dE.view(E.shape),
    )


def _forward(z: Tensor, E: Tensor, parameters: Parameters, eta_max: float) -> tuple[Tensor, Saved]:
    """One chunk z (n, C, F): the state after it, and what backward needs."""
    S = parameters.weight + E
    n, C, F = z.shape
    M = parameters.rates.shape[1]
    V = S.shape[-1] // M
    generators = S[..., :-V]
    made = torch.bmm(z, generators).view(n, C, M - 1, V)
    kv_scale = scale(made[:, :, :2])
    kv = made[:, :, :2] * kv_scale
    if parameters.features is None:
        a, f, f_scale = kv, kv, kv_scale
    else:
        a = torch.bmm(kv.view(n, 2 * C, V), parameters.features).view(n, C, 2, F)
        f = functional.silu(a)
        f_scale = scale(f)
        f *= f_scale
    k, v = f.unbind(2)
    x = torch.stack(
        [torch.bmm(made[:, :, 2 + i], parameters.gate_weight[i])[..., 0] + parameters.gate_bias[i] for i in (0, 1)]
    )
    eta, g = _gates(x, parameters.rates, eta_max)
    target = made.new_empty(n, C, M, V)
    own = torch.bmm(v, generators).view(n, C, M - 1, V)
    target_scale = scale(own)
    torch.mul(own, target_scale, out=target[:, :, :-1])
    target[:, :, -1] = kv[:, :, 1]
    read_E = torch.bmm(k, E).view(n, C, M, V)
    error = target - torch.bmm(k, S).view(n, C, M, V)
    error.addcmul_(read_E, _columns(-torch.expm1(g)))
    A = decay_matrix(g, g)
    L = (A * torch.bmm(k, k.mT)[:, None]).mul_(eta[..., None])
    right = error.transpose(1, 2) * eta[..., None]
    p = torch.linalg.solve_triangular(L.mT, right.mT, upper=True, left=False, unitriangular=True).mT
    end = g[..., -1:]
    grown = (p * (end - g).exp()[..., None]).transpose(1, 2).reshape(n, C, M * V)
    kept = (E.view(n, F, M, V) * end.exp()[:, None]).view(n, F, M * V)
    new = kept.baddbmm_(k.mT, grown)
    return new, Saved(E, made, kv, kv_scale, a, f, f_scale, target, target_scale, read_E, error, x, A, p)


def _backward(
    z: Tensor, s: Saved, parameters: Parameters, eta_max: float, total: Parameters, G: Tensor, outer: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients in z and in the starting state, from G in the final state and those in the chunk's four outputs."""
    n, C, M, V = s.target.shape
    F, rates = z.shape[-1], parameters.rates
    S = parameters.weight + s.E
    generators = S[..., :-V]
    k, v = s.f.unbind(2)
    eta, g = _gates(s.x, rates, eta_max)
    end = g[..., -1:]
    remaining = _columns((end - g).exp())
    d_key, d_value, d_decay, d_start = outer

    # E' = e^{g_C} E + kᵀ (e^{g_C - g} p)
    p = s.p.transpose(1, 2)
    grown = (p * remaining).contiguous()
    dp = torch.bmm(k, G).view(n, C, M, V)
    dk = torch.baddbmm(d_key, grown.view(n, C, -1), G.mT)
    through = (dp * grown).sum(-1).mT  # (n, M, C)
    dg = -through
    dp *= remaining
    dp[:, :, -1] += d_value
    dE = (G.view(n, F, M, V) * end.exp()[:, None]).view(n, F, -1)
    dg[..., -1] += through.sum(-1) + (dE * s.E).view(n, F, M, V).sum((1, 3))
    dg[:, -1] += d_decay
    dE[..., -V:] += d_start

    # (I + L) p = eta * error,  L = eta * A * K Kᵀ
    gram = torch.bmm(k, k.mT)[:, None]
    AK = s.A * gram
    right = torch.linalg.solve_triangular(
        AK * eta[..., None], dp.transpose(1, 2).mT, upper=False, left=False, unitriangular=True
    ).mT  # (n, M, C, V)
    dL = (right @ s.p.mT).neg_()
    X = AK.mul_(dL)
    row = X.sum(-1)
    deta = row.clone()
    dg += eta * row - (eta[:, :, None] @ X)[:, :, 0]
    d_gram = dL.mul_(s.A).mul_(eta[..., None]).sum(1)
    dk.baddbmm_(d_gram + d_gram.mT, k)
    right = right.transpose(1, 2)
    deta += (right * s.error).sum(-1).mT
    d_error = (right * _columns(eta)).contiguous()

    # error = target - S k + (1 - e^g) E k
    kept = g.exp()
    dg -= kept * (d_error * s.read_E).sum(-1).mT
    d_read_E = (d_error * _columns(1 - kept)).view(n, C, -1)
    flat_error = d_error.view(n, C, -1)
    dS = torch.bmm(k.mT, flat_error).neg_()
    dE.baddbmm_(k.mT, d_read_E)
    dk.baddbmm_(flat_error, S.mT, alpha=-1).baddbmm_(d_read_E, s.E.mT)

    # target = unit(S v), v
    d_own = unit_backward(d_error[:, :, :-1], s.target[:, :, :-1], s.target_scale).view(n, C, -1)
    dS[..., :-V].baddbmm_(v.mT, d_own)
    dv = torch.bmm(d_own, generators.mT)
    d_kv = torch.stack([dk, dv], 2)
    if parameters.features is not None:
        assert total.features is not None
        da = torch.ops.aten.silu_backward(unit_backward(d_kv, s.f, s.f_scale), s.a).view(n, 2 * C, F)
        total.features.baddbmm_(s.kv.view(n, 2 * C, V).mT, da)
        d_kv = torch.bmm(da, parameters.features.mT).view(n, C, 2, V)
    d_kv[:, :, 1] += d_error[:, :, -1]

    # k, v, eta, alpha = S z
    dx = _gates_backward(s.x, parameters, eta_max, deta, dg, total)
    d_made = s.made.new_empty(n, C, M - 1, V)
    d_made[:, :, :2] = unit_backward(d_kv, s.kv, s.kv_scale)
    for i in (0, 1):
        torch.mul(dx[i][..., None], parameters.gate_weight[i].mT, out=d_made[:, :, 2 + i])
        total.gate_weight[i].baddbmm_(s.made[:, :, 2 + i].mT, dx[i][..., None])
    d_made = d_made.view(n, C, -1)
    dS[..., :-V].baddbmm_(z.mT, d_made)
    total.weight.add_(dS)
    return torch.bmm(d_made, generators.mT), dE.add_(dS)


def _gates(x: Tensor, rates: Tensor, eta_max: float) -> tuple[Tensor, Tensor]:
    """Gate logits (2, n, C) → eta and cumulative log decay per memory, (n, M, C)."""
    eta, g = eta_max * x[0].sigmoid(), functional.logsigmoid(x[1]).cumsum(-1)
    return eta[:, None] * rates[..., None], g[:, None] * rates[..., None]


def _gates_backward(
    x: Tensor, parameters: Parameters, eta_max: float, deta: Tensor, dg: Tensor, total: Parameters
) -> Tensor:
    """(2, n, C) gradient of the gate logits; adds those of the biases and rates to `total`."""
    rates, sigmoid = parameters.rates[:, None], x[0].sigmoid()
    total.rates.add_(
        (deta @ (eta_max * sigmoid)[..., None] + dg @ functional.logsigmoid(x[1]).cumsum(-1)[..., None])[..., 0]
    )
    deta, dg = (rates @ deta)[:, 0], (rates @ dg)[:, 0]
    d_log_alpha = dg.flip(-1).cumsum(-1).flip(-1)
    dx = torch.stack([deta * eta_max * sigmoid * (1 - sigmoid), d_log_alpha * (-x[1]).sigmoid()])
    total.gate_bias.add_(dx.sum(-1, keepdim=True))
    return dx


def _columns(x: Tensor) -> Tensor:
    """(n, M, C) → (n, C, M, 1), to scale (n, C, M, V)."""
    return x.mT[..., None]
