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
    decay_matrix,
    generate,
    log_sigmoid,
    matrix,
    phi,
    product,
    sigmoid,
    solve,
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
    dS = product(tl.trans(z), d_made, operand, precision)
    add(d_initial + here, dS)
    add(dE + here, dS)
    return product(d_made, tl.trans(tl.load(initial + here) + tl.load(E + here)), operand, precision)


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
    kv,
    phi_kv,
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
    dv,
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
    features += h * size
    gate_weight += h * V
    gate_bias += h
    rates += h * MEMORIES
    states += n * (N + 1) * MEMORIES * size
    kv += n * 2 * C * V
    phi_kv += n * 2 * C * F
    dv += n * C * V
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
        d_f_k = tl.load(matrix(d_keys + chunk * C * F, C, F))
        d_f_v = tl.zeros([C, F], tl.float32)
        d_eta = tl.zeros([C], tl.float32)
        d_log_alpha = tl.zeros([C], tl.float32)
        for m in range(MEMORIES):
            here = matrix(m * size, F, V)
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

            # E' = e^{g_C} E + kᵀ (e^{g_C - g} p)
            after = tl.load(dE + here)
            G = tl.where(commits, after, 0.0)
            end = tl.sum(tl.where(t == C - 1, g, 0.0), 0)
            remaining = tl.exp(end - g)[:, None]
            dp = product(tl.load(matrix(phi_kv, C, F)), G, operand, precision) * remaining
            d_f_k += product(remaining * p, tl.trans(G), operand, precision)
            through = tl.sum(dp * p, 1)
            d_E = tl.exp(end) * G
            d_end = tl.sum(through, 0) + tl.sum(tl.sum(d_E * tl.load(E_i + here), 1), 0)
            dg = tl.where(t == C - 1, d_end, 0.0) - through
            if is_read:
                dp += tl.load(matrix(d_values + chunk * C * V, C, V))
                dg += tl.load(d_decay + chunk * C + t)
                d_E += tl.load(matrix(d_starts + chunk * size, F, V))
            tl.store(dE + here, d_E + tl.where(commits, 0.0, after))

            # (I + L) p = eta * error,  L = eta * A * K Kᵀ
            right = product(tl.trans(X), dp, tl.float32, precision)
            d_eta_m = tl.sum(right * error, 1)
            dL = -product(right, tl.trans(p), tl.float32, precision)
            dL *= decay_matrix(g, t)
            f_k = tl.load(matrix(phi_kv, C, F))
            d_gram = dL * eta_m[:, None]
            d_f_k += product(d_gram + tl.trans(d_gram), f_k, operand, precision)
            dL *= product(f_k, tl.trans(f_k), operand, precision)
            d_eta_m += tl.sum(dL, 1)
            dg += eta_m * tl.sum(dL, 1) - tl.sum(eta_m[:, None] * dL, 0)
            tl.debug_barrier()  # below, other threads add to what is stored above

            # error = target - M₀ k - e^g E k
            d_error = right * eta_m[:, None]
            kept = tl.exp(g)
            f_k, E = tl.load(matrix(phi_kv, C, F)), tl.load(E_i + here)
            dg -= kept * tl.sum(d_error * product(f_k, E, operand, precision), 1)
            d_read_E = -kept[:, None] * d_error
            d_f_k += product(d_read_E, tl.trans(E), operand, precision)
            add(dE + here, product(tl.trans(f_k), d_read_E, operand, precision))
            W = tl.load(initial + here)
            d_f_k -= product(d_error, tl.trans(W), operand, precision)
            add(d_initial + here, -product(tl.trans(f_k), d_error, operand, precision))

            # target = unit(S v); v for the memory that is read
            if is_read:
                tl.store(matrix(dv, C, V), d_error)
            else:
                tl.debug_barrier()
                d_own = unit_backward(d_error, target, scale)
                f_v = tl.load(matrix(phi_kv + C * F, C, F))
                d_f_v += read_backward(
                    f_v,
                    d_own,
                    initial + m * size,
                    E_i + m * size,
                    d_initial + m * size,
                    dE + m * size,
                    F,
                    V,
                    operand,
                    precision,
                )
            total_rates += tl.where(memory == m, tl.sum(d_eta_m * eta + dg * log_alpha, 0), 0.0)
            d_eta += rate * d_eta_m
            d_log_alpha += rate * dg
        tl.debug_barrier()

        d_k = d_f_k
        d_v = tl.load(matrix(dv, C, V))
        k, v = tl.load(matrix(kv, C, V)), tl.load(matrix(kv + C * V, C, V))
        if has_features:
            f_k, f_scale, a = phi(k, features, V, F, operand, precision)
            d_a = silu_backward(unit_backward(d_f_k, f_k, f_scale), a)
            add(matrix(d_features, V, F), product(tl.trans(k), d_a, operand, precision))
            d_k = product(d_a, tl.trans(tl.load(matrix(features, V, F))), operand, precision)
            f_v, f_scale, a = phi(v, features, V, F, operand, precision)
            d_a = silu_backward(unit_backward(d_f_v, f_v, f_scale), a)
            tl.debug_barrier()
            add(matrix(d_features, V, F), product(tl.trans(v), d_a, operand, precision))
            d_v += product(d_a, tl.trans(tl.load(matrix(features, V, F))), operand, precision)
        else:
            d_v += d_f_v

        # k, v, eta, alpha = S z
        dx_eta = d_eta * eta * sigmoid(-x_eta)
        dx_alpha = tl.cumsum(d_log_alpha, 0, reverse=True) * sigmoid(-x_alpha)
        z_i = tl.load(matrix(z + chunk * C * F, C, F))
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
