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

from nestling.ops.self_modifying import features as feature_map
from nestling.ops.self_modifying.derivatives import differentiable
from nestling.ops.self_modifying.features import scale, unit_backward
from nestling.ops.self_modifying.triangular import decays

KEEP_BYTES = 256 * 2**20  # of intermediates in one call: its last chunks'; the backward pass makes the others again

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Parameters(NamedTuple):
    """Everything constant over the sequence, one copy per row and head."""

    weight: Tensor  # (n, F, M*V) initial states
    features: Tensor | None  # (n, K, F)
    gate_weight: Tensor  # (2, n, V, 1)
    gate_bias: Tensor  # (2, n, 1)
    rates: Tensor  # (n, M)


class Kept(NamedTuple):
    """What one chunk's backward needs beside its inputs and the states around it."""

    kv: Tensor  # (n, C, 2, V) unit k and v
    kv_scale: Tensor  # (n, C, 2, 1)
    made: Tensor  # (n, C, 2, V) raw eta and alpha
    a: Tensor  # (n, C, 2, F) before silu (features)
    f: Tensor  # (n, C, 2, F) φ(k), φ(v)
    f_scale: Tensor  # (n, C, 2, 1)
    target: Tensor  # (n, C, M, V)
    target_scale: Tensor  # (n, C, M-1, 1)
    x: Tensor  # (2, n, C) gate logits
    A: Tensor  # (n, M, C, C) decay between two tokens, 1 where t <= s
    m: Tensor  # (n, M, C, V) what is written before its rate: p = eta m


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
        (B, H, T, F), V = z.shape, E.shape[-1]
        N, parameters = T // C, _per_row(B, *tensors[1:-1])
        states = z.new_empty(N + 1, B * H, F, E.shape[-2] * V)
        states[0] = E.view(states.shape[1:])
        keys, values, decay = (z.new_empty(B * H, N, C, *width) for width in ((F,), (V,), ()))
        kept: list[Tensor] = []
        for i, chunk in enumerate(z.reshape(B * H, N, C, F).unbind(1)):
            own = _write(chunk, states[i], parameters, eta_max)
            if (N - i) * _bytes(own) <= KEEP_BYTES:
                kept += own
            eta, g = _commit(own, states[i : i + 2], parameters, eta_max)
            keys[:, i], decay[:, i] = own.f[:, :, 0], g[:, -1]
            torch.mul(own.m[:, -1], eta[:, -1, :, None], out=values[:, i])
            if full is not None:
                states[i + 1] = torch.where(_rows(full[i], H), states[i + 1], states[i])
        ctx.options = plain, full, C, eta_max, len(tensors)
        ctx.save_for_backward(*tensors, states, *kept)
        starts = states[:-1, ..., -V:].transpose(0, 1)
        results = (x.unflatten(0, (B, H)) for x in (keys, values, decay, starts))
        return *results, states[-1].clone().view(E.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plain, full, C, eta_max, given = ctx.options
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor only once
        tensors, rest = saved[:given], saved[given:]
        if torch.is_grad_enabled():
            return (None,) * 4 + differentiable(plain, (full, C, eta_max), tensors, grads)
        z, weight, features = tensors[:3]
        B, H, T, F = z.shape
        N, (states, *kept) = T // C, rest
        recorded = [Kept(*kept[i : i + len(Kept._fields)]) for i in range(0, len(kept), len(Kept._fields))]
        parameters = _per_row(B, *tensors[1:-1])
        total = _per_row(B, *(None if t is None else torch.zeros_like(t) for t in tensors[1:-1]))
        *outer, dE = (g.flatten(0, 1) for g in grads)
        dE, W = dE.flatten(-2), _by_memory(parameters)
        dz = z.new_empty(B * H, N, C, F)
        chunks = z.reshape(dz.shape).unbind(1)
        for i in reversed(range(N)):
            direct = None if full is None else torch.where(_rows(full[i], H), 0, dE)
            G = dE if direct is None else dE - direct
            own = recorded.pop() if recorded else _write(chunks[i], states[i], parameters, eta_max)
            here = tuple(g[:, i] for g in outer)
            dz[:, i], dE = _backward(chunks[i], states[i : i + 2], own, parameters, W, eta_max, total, G, here)
            dE = dE if direct is None else dE + direct
        return None, None, None, None, *_collect(z, weight, features, total, dz, dE, tensors[-1], B, H)


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


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


def _by_memory(parameters: Parameters) -> Tensor:
    """The initial states one by one and transposed, (n*M, V, F)."""
    (n, F, _), M = parameters.weight.shape, parameters.rates.shape[1]
    return parameters.weight.view(n, F, M, -1).permute(0, 2, 3, 1).reshape(n * M, -1, F)


def _write(z: Tensor, E: Tensor, parameters: Parameters, eta_max: float) -> Kept:
    """What one chunk z (n, C, F) generates and writes into the state E, and what backward needs."""
    W, rates = parameters.weight, parameters.rates
    (n, C), M = z.shape[:2], rates.shape[1]
    V = W.shape[-1] // M
    generators = W[..., :-V] + E[..., :-V]
    kv = torch.bmm(z, generators[..., : 2 * V]).view(n, C, 2, V)
    made = torch.bmm(z, generators[..., 2 * V :]).view(n, C, 2, V)
    kv_scale = scale(kv)
    kv *= kv_scale
    if parameters.features is None:
        a, f, f_scale = kv, kv, kv_scale
    else:
        f, a, f_scale = feature_map.forward(kv.view(n, 2 * C, V), parameters.features)
        a, f, f_scale = (x.view(n, C, 2, -1) for x in (a, f, f_scale))
    k, v = f.unbind(2)
    x = torch.stack(
        [torch.bmm(made[:, :, i], parameters.gate_weight[i])[..., 0] + parameters.gate_bias[i] for i in (0, 1)]
    )
    eta, g = _gates(x, rates, eta_max)
    target = kv.new_empty(n, C, M, V)
    own = torch.bmm(v, generators).view(n, C, M - 1, V)
    target_scale = scale(own)
    torch.mul(own, target_scale, out=target[:, :, :-1])
    target[:, :, -1] = kv[:, :, 1]

    # (I + A K Kᵀ eta) m = target - M_0 k - e^g E k
    error = torch.baddbmm(target.view(n, C, -1), k, W, alpha=-1).view(n, C, M, V)
    error.addcmul_(torch.bmm(k, E).view(n, C, M, V), _columns(g.exp()), value=-1)
    A = decays(g, g)
    L = (A * torch.bmm(k, k.mT).tril_(-1)[:, None]).mul_(eta[..., None, :])
    right = error.transpose(1, 2).contiguous()
    m = torch.linalg.solve_triangular(L.mT, right.mT, upper=True, left=False, unitriangular=True).mT
    return Kept(kv, kv_scale, made, a, f, f_scale, target, target_scale, x, A, m)


def _commit(s: Kept, states: Tensor, parameters: Parameters, eta_max: float) -> tuple[Tensor, Tensor]:
    """E' = e^{g_C} E + kᵀ (e^{g_C - g} eta m), states[1] from states[0] (2, n, F, M*V); returns eta and g."""
    n, C, M, V = s.target.shape
    eta, g = _gates(s.x, parameters.rates, eta_max)
    end = g[..., -1:]
    grown = torch.mul(s.m.transpose(1, 2), _columns((end - g).exp() * eta), out=torch.empty_like(s.target))
    E, after = (x.view(n, -1, M, V) for x in states)
    torch.mul(E, end.exp()[:, None], out=after)
    states[1].baddbmm_(s.f[:, :, 0].mT, grown.view(n, C, -1))
    return eta, g


def _backward(
    z: Tensor,
    states: Tensor,
    s: Kept,
    parameters: Parameters,
    W: Tensor,
    eta_max: float,
    total: Parameters,
    G: Tensor,
    outer: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradients in z and in the starting state, from G in the final state and those in the chunk's four outputs.

    states: before and after the chunk; W as `_by_memory` gives it. Decays only enter through e^{g_t - g_s} and
    products with what they scale, so their gradients collapse: that of g_C is <E', G>, that of g_t is
    p·(gradient of p read) - (gradient of error)·(target - M_0 k).
    """
    n, C, M, V = s.target.shape
    F, (E, after) = z.shape[-1], states
    k, v = s.f.unbind(2)
    eta, g = _gates(s.x, parameters.rates, eta_max)
    remaining = (g[..., -1:] - g).exp()
    d_key, d_value, d_decay, d_start = outer

    # E' = e^{g_C} E + kᵀ (e^{g_C - g} eta m)
    grown = torch.mul(s.m.transpose(1, 2), _columns(remaining * eta), out=torch.empty_like(s.target))
    dk = torch.baddbmm(d_key, grown.view(n, C, -1), G.mT)
    dp = torch.mul(torch.bmm(k, G).view(n, C, M, V).transpose(1, 2), remaining[..., None], out=torch.empty_like(s.m))
    dp[:, -1] += d_value
    dE = (G.view(n, F, M, V) * g[:, None, :, -1:].exp()).view(n, F, -1)
    dE[..., -V:] += d_start
    dg = torch.zeros_like(g)
    dg[..., -1] = (G * after).view(n, F, M, V).sum((1, 3))
    p = s.m * eta[..., None]
    dg[:, -1] += d_decay + (p[:, -1] * d_value).sum(-1)

    # (I + A K Kᵀ eta) m = error
    gram = torch.bmm(k, k.mT).tril_(-1)[:, None]
    L = (s.A * gram).mul_(eta[..., None])
    dm = torch.linalg.solve_triangular(L, dp.mT, upper=False, left=False, unitriangular=True).mT  # before its rate
    deta = (dm * s.m).sum(-1)
    dm = dm * eta[..., None]
    d_gram = (dm @ p.mT).mul_(s.A).sum(1).tril_(-1)
    dk.baddbmm_(d_gram + d_gram.mT, k, alpha=-1)
    d_error = dm.transpose(1, 2).contiguous()

    # error = target - M_0 k - e^g E k
    along = (d_error * s.target).sum(-1, keepdim=True)  # (n, C, M, 1)
    back = torch.bmm(dm.reshape(n * M, C, V), W).view(n, M, C, F)
    dg += (back * k[:, None]).sum(-1) - along[..., 0].mT
    flat = d_error.view(n, C, -1)
    d_read = torch.mul(d_error, _columns(g.exp()), out=grown).view(n, C, -1)
    dk.sub_(back.sum(1)).baddbmm_(d_read, E.mT, alpha=-1)
    total.weight.baddbmm_(k.mT, flat, alpha=-1)
    dE.baddbmm_(k.mT, d_read, alpha=-1)

    # target = unit(S v), v
    generators = parameters.weight[..., :-V] + E[..., :-V]
    d_own = torch.addcmul(d_error[:, :, :-1], s.target[:, :, :-1], along[:, :, :-1], value=-1).mul_(s.target_scale)
    d_own = d_own.view(n, C, -1)
    d_kv = torch.stack([dk, torch.bmm(d_own, generators.mT)], 2)
    if parameters.features is not None:
        assert total.features is not None
        da = feature_map.backward(d_kv, s.f, s.a, s.f_scale).view(n, 2 * C, F)
        total.features.baddbmm_(s.kv.view(n, 2 * C, V).mT, da)
        d_kv = torch.bmm(da, parameters.features.mT).view(n, C, 2, V)
    d_kv[:, :, 1] += d_error[:, :, -1]

    # k, v, eta, alpha = S z
    dx = _gates_backward(s.x, parameters, eta_max, deta, dg, total)
    d_made = z.new_empty(n, C, M - 1, V)
    d_made[:, :, :2] = unit_backward(d_kv, s.kv, s.kv_scale)
    for i in (0, 1):
        torch.mul(dx[i][..., None], parameters.gate_weight[i].mT, out=d_made[:, :, 2 + i])
        total.gate_weight[i].baddbmm_(s.made[:, :, i].mT, dx[i][..., None])
    d_made = d_made.view(n, C, -1)
    d_generators = torch.bmm(z.mT, d_made).baddbmm_(v.mT, d_own)
    total.weight[..., :-V] += d_generators
    dE[..., :-V] += d_generators
    return torch.bmm(d_made, generators.mT), dE


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
