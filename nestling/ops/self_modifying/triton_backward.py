"""The backward kernel of the default rule: chunks in reverse, each recomputed from its first state.

The same program per row and head as forward. The gradient of the state is carried in device memory, one memory's
matrix on chip at a time; gradients of parameters are summed there over the chunks of a row, and over rows by the
caller. Each step mirrors fused.py, whose backward pass is the same mathematics in torch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from nestling.ops.self_modifying.triton_forward import (
    GENERATORS,
    MEMORIES,
    generate,
    log_sigmoid,
    matrix,
    phi,
    product,
    sigmoid,
    write,
)


@triton.jit
def unit_backward(grad, unit, scale):
    """Gradient of x in unit = x * scale(x)."""
    return (grad - unit * tl.sum(grad * unit, 1)[:, None]) * scale[:, None]


@triton.jit
def silu_backward(grad, a):
    s = sigmoid(a)
    return grad * s * (1.0 + a * (1.0 - s))


@triton.jit
def add(target, value):
    tl.store(target, tl.load(target) + value)


@triton.jit
def read_backward(
    z,
    d_made,
    initial,
    E,
    d_initial,
    dE,
    F: tl.constexpr,
    V: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """made = z S: adds the gradient of S to those of both of its terms, returns that of z."""
    here = matrix(0, F, V)
    S = tl.load(initial + here) + tl.load(E + here)
    dS = product(tl.trans(z), d_made, operand, precision)
    add(d_initial + here, dS)
    add(dE + here, dS)
    return product(d_made, tl.trans(S), operand, precision)


@triton.jit
def gate_backward(z, dx, weight, initial, E, d_initial, dE, F: tl.constexpr, V: tl.constexpr):
    """x = z·(S w) + b: adds the gradient of S, returns those of z and w."""
    here = matrix(0, F, V)
    S = tl.load(initial + here) + tl.load(E + here)
    w = tl.load(weight + tl.arange(0, V))
    u = tl.sum(z * dx[:, None], 0)
    dS = u[:, None] * w[None, :]
    add(d_initial + here, dS)
    add(dE + here, dS)
    return dx[:, None] * tl.sum(S * w[None, :], 1)[None, :], tl.sum(S * u[:, None], 0)


@triton.jit
def backward(
    z,
    initial,
    features,
    gate_weight,
    gate_bias,
    rates,
    full,
    states,
    d_keys,
    d_values,
    d_decay,
    d_starts,
    dz,
    d_initial,
    d_features,
    d_gate_weight,
    d_gate_bias,
    d_rates,
    dE,
    eta_max,
    N,
    B,
    H,
    C: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    has_features: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    """Inputs and outputs' gradients as in forward. dE (B, H, M, F, V) holds the final state's gradient and becomes
    the first state's; the others are float32 and zero, one copy per row: d_initial (B, H, M, F, V) and so on.
    """
    size: tl.constexpr = F * V
    n = tl.program_id(0).to(tl.int64)
    b, h = n // H, n % H
    initial += h * MEMORIES * size
    features += h * F * V
    gate_weight += h * V
    gate_bias += h
    rates += h * MEMORIES
    states += n * (N + 1) * MEMORIES * size
    d_initial += n * MEMORIES * size
    d_features += n * size
    dE += n * MEMORIES * size
    t, memory = tl.arange(0, C), tl.arange(0, 8)
    total_rates = tl.zeros([8], tl.float32)
    total_eta = tl.zeros([V], tl.float32)
    total_alpha = tl.zeros([V], tl.float32)
    bias_eta = 0.0
    bias_alpha = 0.0
    for back in range(N):
        i = N - 1 - back
        E_i = states + i * MEMORIES * size
        chunk = n * N + i
        z_i = tl.load(matrix(z + chunk * C * F, C, F))
        k, k_scale, v, v_scale, x_eta, x_alpha = generate(
            z_i, initial, E_i, gate_weight, gate_bias, H, F, V, operand, precision
        )
        f_k, f_v = k, v
        if has_features:
            f_k = phi(k, features, V, F, operand, precision)[0]
            f_v = phi(v, features, V, F, operand, precision)[0]
        eta, log_alpha = eta_max * sigmoid(x_eta), tl.cumsum(log_sigmoid(x_alpha), 0)
        gram = product(f_k, tl.trans(f_k), operand, precision)
        commits = tl.load(full + i * B + b) != 0
        d_f_k = tl.load(matrix(d_keys + chunk * C * F, C, F))
        d_f_v = tl.zeros([C, F], tl.float32)
        d_v = tl.zeros([C, V], tl.float32)
        d_gram = tl.zeros([C, C], tl.float32)
        d_eta = tl.zeros([C], tl.float32)
        d_log_alpha = tl.zeros([C], tl.float32)
        for m in range(MEMORIES):
            here = matrix(m * size, F, V)
            W, E, rate = tl.load(initial + here), tl.load(E_i + here), tl.load(rates + m)
            is_read = m == GENERATORS
            eta_m, g = rate * eta, rate * log_alpha
            p, target, scale, read_E, error, A, X = write(
                W, E, f_k, f_v, v, is_read, eta_m, g, gram, C, operand, precision
            )

            # E' = e^{g_C} E + kᵀ (e^{g_C - g} p)
            after = tl.load(dE + here)
            G = tl.where(commits, after, 0.0)
            end = tl.sum(tl.where(t == C - 1, g, 0.0), 0)
            remaining = tl.exp(end - g)[:, None]
            dp = product(f_k, G, operand, precision) * remaining
            d_f_k += product(remaining * p, tl.trans(G), operand, precision)
            through = tl.sum(dp * p, 1)
            d_E = tl.exp(end) * G
            d_end = tl.sum(through, 0) + tl.sum(tl.sum(d_E * E, 1), 0)
            dg = tl.where(t == C - 1, d_end, 0.0) - through
            if is_read:
                dp += tl.load(matrix(d_values + chunk * C * V, C, V))
                dg += tl.load(d_decay + chunk * C + t)
                d_E += tl.load(matrix(d_starts + chunk * size, F, V))
            d_E += tl.where(commits, 0.0, after)

            # (I + L) p = eta * error,  L = eta * A * K Kᵀ
            right = product(tl.trans(X), dp, tl.float32, precision)
            dL = -product(right, tl.trans(p), tl.float32, precision)
            d_gram += dL * A * eta_m[:, None]
            dL *= A * gram
            d_eta_m = tl.sum(dL, 1) + tl.sum(right * error, 1)
            dg += eta_m * tl.sum(dL, 1) - tl.sum(eta_m[:, None] * dL, 0)

            # error = target - M₀ k - e^g E k
            d_error = right * eta_m[:, None]
            kept = tl.exp(g)
            dg -= kept * tl.sum(d_error * read_E, 1)
            d_read_E = -kept[:, None] * d_error
            d_f_k += product(d_read_E, tl.trans(E), operand, precision)
            d_f_k -= product(d_error, tl.trans(W), operand, precision)
            d_E += product(tl.trans(f_k), d_read_E, operand, precision)
            d_W = -product(tl.trans(f_k), d_error, operand, precision)

            # target = unit(S v); v for the memory that is read
            d_own = tl.where(is_read, 0.0, unit_backward(d_error, target, scale))
            d_v += tl.where(is_read, d_error, 0.0)
            d_f_v += product(d_own, tl.trans(W + E), operand, precision)
            dS = product(tl.trans(f_v), d_own, operand, precision)
            add(d_initial + here, d_W + dS)
            tl.store(dE + here, d_E + dS)
            total_rates += tl.where(memory == m, tl.sum(d_eta_m * eta + dg * log_alpha, 0), 0.0)
            d_eta += rate * d_eta_m
            d_log_alpha += rate * dg
        d_f_k += product(d_gram + tl.trans(d_gram), f_k, operand, precision)

        d_k = d_f_k
        if has_features:
            f_k, f_scale, a = phi(k, features, V, F, operand, precision)
            d_a = silu_backward(unit_backward(d_f_k, f_k, f_scale), a)
            d_matrix = product(tl.trans(k), d_a, operand, precision)
            frozen = tl.trans(tl.load(matrix(features, V, F)))
            d_k = product(d_a, frozen, operand, precision)
            f_v, f_scale, a = phi(v, features, V, F, operand, precision)
            d_a = silu_backward(unit_backward(d_f_v, f_v, f_scale), a)
            add(matrix(d_features, V, F), d_matrix + product(tl.trans(v), d_a, operand, precision))
            d_v += product(d_a, frozen, operand, precision)
        else:
            d_v += d_f_v

        # k, v, eta, alpha = S z
        dx_eta = d_eta * eta * sigmoid(-x_eta)
        dx_alpha = tl.cumsum(d_log_alpha, 0, reverse=True) * sigmoid(-x_alpha)
        tl.debug_barrier()  # other threads have stored the gradients that are added to
        d_made = unit_backward(d_k, k, k_scale)
        d_z = read_backward(z_i, d_made, initial, E_i, d_initial, dE, F, V, operand, precision)
        d_made = unit_backward(d_v, v, v_scale)
        d_z += read_backward(
            z_i, d_made, initial + size, E_i + size, d_initial + size, dE + size, F, V, operand, precision
        )
        part, d_w = gate_backward(
            z_i, dx_eta, gate_weight, initial + 2 * size, E_i + 2 * size, d_initial + 2 * size, dE + 2 * size, F, V
        )
        d_z += part
        total_eta += d_w
        part, d_w = gate_backward(
            z_i,
            dx_alpha,
            gate_weight + H * V,
            initial + 3 * size,
            E_i + 3 * size,
            d_initial + 3 * size,
            dE + 3 * size,
            F,
            V,
        )
        d_z += part
        total_alpha += d_w
        bias_eta += tl.sum(dx_eta, 0)
        bias_alpha += tl.sum(dx_alpha, 0)
        tl.store(matrix(dz + chunk * C * F, C, F), d_z)
        tl.debug_barrier()
    columns = tl.arange(0, V)
    tl.store(d_gate_weight + 2 * n * V + columns, total_eta)
    tl.store(d_gate_weight + (2 * n + 1) * V + columns, total_alpha)
    tl.store(d_gate_bias + 2 * n, bias_eta)
    tl.store(d_gate_bias + 2 * n + 1, bias_alpha)
    tl.store(d_rates + n * MEMORIES + memory, total_rates, mask=memory < MEMORIES)
