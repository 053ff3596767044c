"""The forward kernel of the default rule, and the pieces of a chunk that the backward kernel runs again.

One program per row and head walks over its chunks. A chunk's first states (M, F, V) stand in device memory, where the
backward pass finds them, and one memory's matrix is on chip at a time; README.md counts the bytes. Letters as in
writes.py; M = 5.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)  # of unit length, as in writes.py
GENERATORS = tl.constexpr(4)  # k, v, eta, alpha; memory 4 is the one that is read
MEMORIES = tl.constexpr(5)


@triton.jit
def matrix(start, rows: tl.constexpr, columns: tl.constexpr):
    """Pointers to a contiguous (rows, columns) matrix."""
    return start + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def product(a, b, operand: tl.constexpr, precision: tl.constexpr):
    return tl.dot(a.to(operand), b.to(operand), input_precision=precision)


@triton.jit
def unit(x):
    """x / sqrt(|x|² + eps), and the factor."""
    scale = tl.rsqrt(tl.sum(x * x, 1) + EPS)
    return x * scale[:, None], scale


@triton.jit
def log_sigmoid(x):
    """log(1 + y) as 2 artanh(y / (2 + y)), all digits where a memory hardly decays: log(1 + 1e-8) would be 0."""
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    w = s * s  # at most 1/9: seven terms of the series are float32's 24 bits
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
    return tl.minimum(x, 0.0) - 2.0 * s * series


@triton.jit
def sigmoid(x):
    """By the exponential that cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def phi(x, features, K: tl.constexpr, F: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr):
    """unit(silu(x features)), its factor, and what silu saw."""
    a = product(x, tl.load(matrix(features, K, F)), operand, precision)
    f, scale = unit(a * sigmoid(a))
    return f, scale, a


@triton.jit
def gate(z, S, weight, bias, V: tl.constexpr):
    """Logits w·(Sᵀ z) + b as z·(S w), so that no product of matrices is needed."""
    w = tl.load(weight + tl.arange(0, V))
    return tl.sum(z * tl.sum(S * w[None, :], 1)[None, :], 1) + tl.load(bias)


@triton.jit
def generate(
    z,
    initial,
    E,
    features,
    gate_weight,
    gate_bias,
    kv,
    phi_kv,
    H,
    C: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    has_features: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """From z (C, F) to the scratch of the program: unit k and v (2, C, V) and what the memories see of them (2, C, F).

    Returns the factors of unit length and the logits of eta and alpha.
    """
    here = matrix(0, F, V)
    S = tl.load(initial + here) + tl.load(E + here)
    k, k_scale = unit(product(z, S, operand, precision))
    tl.store(matrix(kv, C, V), k)
    if has_features:
        tl.store(matrix(phi_kv, C, F), phi(k, features, V, F, operand, precision)[0])
    S = tl.load(initial + F * V + here) + tl.load(E + F * V + here)
    v, v_scale = unit(product(z, S, operand, precision))
    tl.store(matrix(kv + C * V, C, V), v)
    if has_features:
        tl.store(matrix(phi_kv + C * F, C, F), phi(v, features, V, F, operand, precision)[0])
    S = tl.load(initial + 2 * F * V + here) + tl.load(E + 2 * F * V + here)
    x_eta = gate(z, S, gate_weight, gate_bias, V)
    S = tl.load(initial + 3 * F * V + here) + tl.load(E + 3 * F * V + here)
    x_alpha = gate(z, S, gate_weight + H * V, gate_bias + H, V)
    tl.debug_barrier()  # other threads load what this one has stored
    return k_scale, v_scale, x_eta, x_alpha


@triton.jit
def decay_matrix(g, t):
    """e^{g_t - g_s} for s < t, else 0."""
    return tl.exp(tl.where(t[:, None] > t[None, :], g[:, None] - g[None, :], -float("inf")))


@triton.jit
def inverse(L, C: tl.constexpr, precision: tl.constexpr):
    """(I + L)^-1 of a strictly lower L: pairs of inverted diagonal blocks join into blocks of twice the width.

    Every intermediate is part of the inverse, which stays small; powers of L, as in plain doubling, reach 1e27.
    """
    t = tl.arange(0, C)
    apart = t[:, None] ^ t[None, :]  # its highest bit i: blocks of width 2^i that the two tokens lie in, of one pair
    X = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, L, 0.0)
    for i in range(1, 4 + C // 32):  # log2(C) levels for C = 16, 32, 64
        joint = product(tl.where(apart >> i == 1, L, 0.0), X, tl.float32, precision)
        X -= product(X, joint, tl.float32, precision)
    return X


@triton.jit
def solve(
    initial,
    E,
    v,
    phi_kv,
    is_read,
    eta,
    g,
    C: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """One memory's system (I + L) p = eta error: its target and the factor of that, error, and the inverse of I + L.

    Everything else is loaded again where it is needed, behind a barrier: held meanwhile, it would not fit in registers.
    """
    W, M = tl.load(matrix(initial, F, V)), tl.load(matrix(E, F, V))
    target, scale = unit(product(tl.load(matrix(phi_kv + C * F, C, F)), W + M, operand, precision))
    if is_read:
        target = tl.load(matrix(v, C, V))
    keys = tl.load(matrix(phi_kv, C, F))
    error = target - product(keys, W, operand, precision)
    error -= tl.exp(g)[:, None] * product(keys, M, operand, precision)
    gram = product(keys, tl.trans(keys), operand, precision)
    X = inverse(decay_matrix(g, tl.arange(0, C)) * gram * eta[:, None], C, precision)
    tl.debug_barrier()
    return target, scale, error, X


@triton.jit
def forward(
    z,
    initial,
    features,
    gate_weight,
    gate_bias,
    rates,
    full,
    states,
    kv,
    phi_kv,
    keys,
    values,
    decay,
    starts,
    eta_max,
    N,
    B,
    H,
    C: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    has_features: tl.constexpr,
    keep: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """z (B, H, N, C, F), initial (H, M, F, V), features (H, V, F), gates (2, H, ...), rates (H, M), full (N, B),
    states (B, H, N + 1 or 2, M, F, V) with the first one given, scratch kv (B, H, 2, C, V), phi_kv (B, H, 2, C, F)
    → keys, values, decay, starts (B, H, N, ...).
    """
    size: tl.constexpr = F * V
    n = tl.program_id(0).to(tl.int64)
    b, h = n // H, n % H
    initial += h * MEMORIES * size
    features += h * size
    gate_weight += h * V
    gate_bias += h
    rates += h * MEMORIES
    states += n * ((N + 1) if keep else 2) * MEMORIES * size
    kv += n * 2 * C * V
    phi_kv += n * 2 * C * F
    t = tl.arange(0, C)
    for i in range(N):
        E_i = states + (i if keep else i % 2) * MEMORIES * size
        E_next = states + ((i + 1) if keep else (i + 1) % 2) * MEMORIES * size
        chunk = n * N + i
        k_scale, v_scale, x_eta, x_alpha = generate(
            tl.load(matrix(z + chunk * C * F, C, F)),
            initial,
            E_i,
            features,
            gate_weight,
            gate_bias,
            kv,
            phi_kv,
            H,
            C,
            F,
            V,
            has_features,
            operand,
            precision,
        )
        eta, log_alpha = eta_max * sigmoid(x_eta), tl.cumsum(log_sigmoid(x_alpha), 0)
        commits = tl.load(full + i * B + b) != 0
        for m in range(MEMORIES):
            rate = tl.load(rates + m)
            is_read = m == GENERATORS
            eta_m, g = rate * eta, rate * log_alpha
            target, scale, error, X = solve(
                initial + m * size,
                E_i + m * size,
                kv + C * V,
                phi_kv,
                is_read,
                eta_m,
                g,
                C,
                F,
                V,
                operand,
                precision,
            )
            p = product(X, eta_m[:, None] * error, tl.float32, precision)
            f_k, E = tl.load(matrix(phi_kv, C, F)), tl.load(matrix(E_i + m * size, F, V))
            end = tl.sum(tl.where(t == C - 1, g, 0.0), 0)
            grown = product(tl.trans(f_k), tl.exp(end - g)[:, None] * p, operand, precision)
            tl.store(matrix(E_next + m * size, F, V), tl.where(commits, tl.exp(end) * E + grown, E))
            if is_read:
                tl.store(matrix(keys + chunk * C * F, C, F), f_k)
                tl.store(matrix(values + chunk * C * V, C, V), p)
                tl.store(decay + chunk * C + t, g)
                tl.store(matrix(starts + chunk * size, F, V), E)
        tl.debug_barrier()  # the next chunk's loads see what other threads have stored
