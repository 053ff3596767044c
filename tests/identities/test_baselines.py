"""The layers of the baselines are the equations of their papers, written out here once more with torch alone."""

import torch
from torch.nn import functional as F

from nestling.memories import (
    DeltaRule,
    GatedDeltaRule,
    LinearAttention,
    Mamba,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    Retention,
    TTTMemory,
)
from nestling.testing import assert_close

DIM, HEADS, T = 16, 2, 11


def stream():
    return torch.randn(2, T, DIM, dtype=torch.float64)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, T, K)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def test_linear_attention_is_attention_with_weights_phi_q_phi_k():
    """Katharopoulos et al. 2020, causal: a weighted mean of the values."""
    layer, x = LinearAttention(DIM, HEADS, 4).double(), stream()
    q, k = (F.elu(heads(z)) + 1 for z in layer.project_qk(x).chunk(2, -1))
    weights = (q @ k.mT).tril()
    expected = joined(weights @ heads(layer.project_v(x)) / weights.sum(-1, keepdim=True))
    assert_close(layer(x)[0], layer.project_out(expected), "y", 1e-6)  # the layer adds 1e-6 to the sum


def test_retention_is_rotated_products_with_a_fixed_decay():
    """Sun et al. 2023: complex numbers turned by their position, gamma^(n-m), group norm, swish gate."""
    layer, x = Retention(DIM, HEADS, 4).double(), stream()
    n = torch.arange(T, dtype=torch.float64)
    angle = torch.exp(1j * n[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    q, k = (torch.complex(*heads(z).chunk(2, -1)) * angle for z in layer.project_qk(x).chunk(2, -1))
    gamma = 1 - 2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)
    decay = (gamma[:, None, None] ** (n[:, None] - n)).tril()
    o = (q @ k.mT.conj()).real * 8**-0.5 * decay @ heads(layer.project_v(x))
    mean, var = o.mean(-1, keepdim=True), o.var(-1, keepdim=True, unbiased=False)
    gate = layer.project_gate(x)
    expected = layer.project_out(gate * gate.sigmoid() * joined((o - mean) / (var + 1e-5).sqrt()))
    assert_close(layer(x)[0], expected, "y")


def convolved(layer, x):
    """q, k of unit norm and v, (B, H, T, K), after a causal convolution of 4 taps and SiLU."""
    mixed, w = layer.frame.project_qkv(x), layer.frame.conv.weight
    past = F.pad(mixed, (0, 0, 3, 0))
    mixed = F.silu(sum(w[j] * past[:, j : j + T] for j in range(4)))
    q, k, v = (heads(z) for z in mixed.split([DIM, DIM, mixed.shape[-1] - 2 * DIM], -1))
    return *(z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k)), v


def written(q, k, v, beta, alpha):
    """o_t = S_t q_t, S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, as the papers print it."""
    S = torch.zeros(2, HEADS, v.shape[-1], k.shape[-1], dtype=torch.float64)
    outputs, eye = [], torch.eye(k.shape[-1], dtype=torch.float64)
    for t in range(T):
        key, b = k[:, :, t, None, :], beta[:, :, t, None, None]
        S = alpha[:, :, t, None, None] * S @ (eye - b * key.mT @ key) + b * v[:, :, t, :, None] @ key
        outputs.append((S @ q[:, :, t, :, None])[..., 0])
    o = torch.stack(outputs, 2)
    return joined(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())


def test_delta_net():
    """Yang et al. 2024, with the layer around it."""
    layer, x = DeltaRule(DIM, HEADS, 4).double(), stream()
    beta = layer.gates.linear(x).sigmoid().transpose(1, 2)
    expected = written(*convolved(layer, x), beta, torch.ones_like(beta))
    assert_close(layer(x)[0], layer.frame.project_out(expected), "y")


def test_gated_delta_net():
    """Yang et al. 2025, with Mamba2's decay exp(-A softplus(W x + b)) and the output gate."""
    layer, x = GatedDeltaRule(DIM, HEADS, 4, expansion=2).double(), stream()
    beta = layer.gates.linear(x).sigmoid().transpose(1, 2)
    step = (1 + layer.decay.linear(x).exp()).log()
    alpha = (-layer.decay.log_rate.exp() * step).exp().transpose(1, 2)
    gate = layer.frame.project_gate(x)
    expected = written(*convolved(layer, x), beta, alpha) * gate * gate.sigmoid()
    assert_close(layer(x)[0], layer.frame.project_out(expected), "y")


def test_ttt():
    """Sun et al. 2024 at chunk size 1, where the memory is trained online by autograd: each token one step."""
    layer, x = TTTMemory(DIM, HEADS, chunk_size=1, memory="linear").double(), stream()
    past = F.pad(layer.project_qk(x).repeat(1, 1, 2), (0, 0, 3, 0))
    q, k = sum(layer.conv.weight[j] * past[:, j : j + T] for j in range(4)).chunk(2, -1)
    eta, gate = layer.gates.linear(x).sigmoid() / 8, F.gelu(layer.project_gate(x), approximate="tanh")
    expected = torch.zeros(2, T, HEADS, 8, dtype=torch.float64)
    for b in range(2):
        for h in range(HEADS):
            queries, keys, values = (z[b].unflatten(-1, (HEADS, 8))[:, h] for z in (q, k, layer.project_v(x)))
            scale, shift = (p.view(HEADS, 8)[h] for p in (layer.memory_scale, layer.memory_shift))
            W, bias = layer.initial[0][h, :-1].detach(), layer.initial[0][h, -1].detach()

            def f(z, W, bias, scale=scale, shift=shift):
                return z + F.layer_norm(z @ W + bias, (8,), scale, shift, 1e-6)

            for t in range(T):
                W, bias = W.requires_grad_(), bias.requires_grad_()
                loss = 0.5 * (f(keys[t], W, bias) - values[t]).square().sum()
                dW, db = torch.autograd.grad(loss, (W, bias), retain_graph=True)
                W, bias = (W - eta[b, t, h] * dW).detach(), (bias - eta[b, t, h] * db).detach()
                expected[b, t, h] = f(queries[t], W, bias).detach()
    assert_close(layer(x)[0], layer.project_out(layer.norm(expected.flatten(2)) * gate), "y", 1e-9)


def turned(x, places):
    """Rotary positions as complex numbers: x (T, K)."""
    angle = places[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    z = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
    return torch.cat([z.real, z.imag], -1)


def softmax_read(q, keys, values):
    return (keys @ q * 8**-0.5).softmax(0) @ values


def windowed(attention, x, window):
    """Token by token over the window and the persistent tokens, which are not turned."""
    out, places = torch.zeros_like(x), torch.arange(T, dtype=torch.float64)
    fixed = F.linear(attention.persistent, attention.qkv.weight).chunk(3, -1)[1:]
    for b in range(len(x)):
        for h in range(HEADS):
            part = slice(8 * h, 8 * h + 8)
            q, k, v = (z[:, part] for z in attention.qkv(x[b]).chunk(3, -1))
            q, k = turned(q, places), turned(k, places)
            for t in range(T):
                near = slice(max(0, t - window + 1), t + 1)
                keys, values = (torch.cat([p[:, part], z[near]]) for p, z in zip(fixed, (k, v), strict=True))
                out[b, t, part] = softmax_read(q[t], keys, values)
    return attention.out(out)


def normed(x, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_titans_mag_and_mal():
    """Sections 4.2, 4.3 of Behrouz et al. 2024; the memory itself is tests/ops/test_titans_op.py."""
    gate, layer, x = MemoryAsGate(DIM, HEADS, window=5).double(), MemoryAsLayer(DIM, HEADS, window=5).double(), stream()
    expected = normed(windowed(gate.attention, x, 5)) * normed(gate.memory(x)[0]).sigmoid()
    assert_close(gate(x)[0], expected, "memory as gate", 1e-9)
    h = layer.memory(x)[0]
    assert_close(layer(x)[0], h + windowed(layer.attention, normed(x + h), 5), "memory as layer", 1e-9)


def test_titans_mac():
    """Section 4.1 of Behrouz et al. 2024, segments of 4, token by token."""
    layer, x = MemoryAsContext(DIM, HEADS, chunk_size=4).double(), stream()[:1]
    fixed, state, tail, outputs = layer.project_kv(layer.persistent).chunk(2, -1), None, None, []
    for t in range(T):
        first = t - t % 4
        if t == first:
            moved = [0.0, 0.0] if state is None else state.anchor
            W2, W1 = (w + d for w, d in zip(layer.memory.initial, moved, strict=True))
            z = heads(layer.project_recall(x))
            z = z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            recalled = normed(joined(z + F.silu(z @ W2) @ W1))
        y = torch.zeros(1, DIM, dtype=torch.float64)
        for h in range(HEADS):
            part, seen = slice(8 * h, 8 * h + 8), slice(first, t + 1)
            places = torch.arange(t + 1 - first, dtype=torch.float64)
            q = turned(layer.project_q(x[0, t : t + 1])[:, part], places[-1:])[0]
            keys, values = [fixed[0][:, part]], [fixed[1][:, part]]
            for source in (recalled, x):
                k, v = layer.project_kv(source[0, seen]).chunk(2, -1)
                keys.append(turned(k[:, part], places))
                values.append(v[:, part])
            y[0, part] = softmax_read(q, torch.cat(keys), torch.cat(values))
        y = normed(layer.out(y))[:, None]
        queries, k, v, tail = layer.frame.enter(y, tail, None)
        o, state = layer.memory(y, queries, k, v, state)
        outputs.append(y * normed(layer.frame.leave(o, x)).sigmoid())
    assert_close(layer(x)[0], torch.cat(outputs, 1), "y", 1e-9)


def test_mamba():
    """Algorithm 2 of Gu and Dao 2023, with their names: the block of one layer, token by token."""
    layer, x = Mamba(DIM, expansion=2, states=3).double(), stream()
    u, z = layer.project_in(x).chunk(2, -1)
    past = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(layer.conv.weight[j] * past[:, j : j + T] for j in range(4)))
    dt, B, C = layer.project_chosen(u).split([1, 3, 3], -1)
    delta, A = (1 + layer.project_step(dt).exp()).log(), -layer.log_rate.exp().view(32, 3)
    h, outputs = torch.zeros(2, 32, 3, dtype=torch.float64), []
    for t in range(T):
        d = delta[:, t, :, None]
        h = (d * A).exp() * h + d * B[:, t, None] * u[:, t, :, None]
        outputs.append((h * C[:, t, None]).sum(-1) + layer.skip * u[:, t])
    assert_close(layer(x)[0], layer.project_out(torch.stack(outputs, 1) * z * z.sigmoid()), "y")
