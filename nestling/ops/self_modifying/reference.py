"""Self-modifying Titans as the plain token loop: equations (83)-(93) with an explicit chunk anchor.

The state is the anchor (the memories at the last chunk border, from which keys, values and gradients are generated),
the running memories (after the last token), and how many tokens the open chunk has.

Written from the paper, independently of chunk.py: every memory is an explicit matrix, every token one step.
Matrices are stored (in, out), so M(z) = Mᵀ z here where the paper writes M z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.self_modifying.rule import Rule, memory_names

Matrices = list[Tensor]  # one (B, H, in, out) for linear and feature memories, two for the 2-layer MLP


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
    count: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Read and write all memories of every head, token by token. Arguments and results as in chunk.self_modifying."""
    B, T, H, _ = z.shape
    names = memory_names(rates.shape[1])
    initial = {name: [w[None, :, m].expand(B, -1, -1, -1) for w in weights] for m, name in enumerate(names)}
    anchor = memory = initial
    if state is not None:
        half = len(weights)
        anchor, memory = (
            {n: [w + s[:, :, m] for w, s in zip(initial[n], part, strict=True)] for m, n in enumerate(names)}
            for part in (state[:half], state[half:])
        )
    count = torch.zeros(B, dtype=torch.long, device=z.device) if count is None else count
    outputs = []
    for t in range(T):
        k = unit(call(anchor["k"], z[:, t], features))
        v = unit(call(anchor["v"], z[:, t], features))
        eta = rule.eta_max * torch.sigmoid(gate(anchor["eta"], z[:, t], features, gate_weight[0], gate_bias[0]))
        alpha = torch.sigmoid(gate(anchor["alpha"], z[:, t], features, gate_weight[1], gate_bias[1]))
        q_t = unit(call(anchor["q"], z[:, t], features)) if q is None else q[:, t]
        reader = memory if rule.read == "causal" else anchor
        outputs.append(call(reader["memory"], q_t, features))
        written = {}
        for m, name in enumerate(names):
            target = v if name == "memory" and not rule.self_values else unit(call(anchor[name], v, features))
            rate, kept = rates[:, m] * eta, alpha ** rates[:, m]  # (B, H)
            written[name] = write(memory[name], anchor[name], initial[name], k, target, rate, kept, features, rule)
        real = torch.ones_like(count, dtype=torch.bool) if lengths is None else lengths.to(count.device) > t
        memory = pick(real, written, memory)
        count = count + real
        anchor = pick(real & (count % chunk_size == 0), memory, anchor)
    y = torch.stack(outputs, 1) if outputs else z.new_zeros(B, 0, H, weights[-1].shape[-1])
    ends = [
        [torch.stack([M[n][i] - initial[n][i] for n in names], 2) for i in range(len(weights))]
        for M in (anchor, memory)
    ]
    return y, (*ends[0], *ends[1])


def call(M: Matrices, z: Tensor, features: Tensor | None) -> Tensor:
    """M(z): Mᵀ z, Mᵀ φ(z) with features, or z + M₂ᵀ silu(M₁ᵀ z) for two matrices. z (B, H, K)."""
    if len(M) == 2:
        return z + apply(M[1], torch.nn.functional.silu(apply(M[0], z)))
    return apply(M[0], key(z, features))


def key(z: Tensor, features: Tensor | None) -> Tensor:
    """What the first matrix sees of z: z, or its fixed features φ(z) = unit(silu(Wᵀ z))."""
    return z if features is None else unit(torch.nn.functional.silu(apply(features.expand(len(z), -1, -1, -1), z)))


def write(
    M: Matrices,
    S: Matrices,
    M0: Matrices,
    k: Tensor,
    target: Tensor,
    eta: Tensor,
    alpha: Tensor,
    features: Tensor | None,
    rule: Rule,
) -> Matrices:
    """(88): decay, erase at the key, and one gradient step of the objective taken at the anchor S."""
    minus_error = target - call(S, k, features) if rule.objective == "l2" else target
    if len(M) == 1:
        return [step(M[0], M0[0], key(k, features), minus_error, eta, alpha, rule, rule.erase)]
    a = apply(S[0], k)
    h = torch.nn.functional.silu(a)
    s = torch.sigmoid(a)
    slope = s * (1 + a * (1 - s))
    first = (S[1] @ minus_error[..., None])[..., 0] * slope
    if not rule.erase_hidden:
        second = step(M[1], M0[1], h, minus_error, eta, alpha, rule, "none")
    else:
        second = step(M[1], M0[1], h, minus_error, eta / (1 + eta * (h * h).sum(-1)), alpha, rule, rule.erase)
    return [step(M[0], M0[0], k, first, eta, alpha, rule, rule.erase), second]


def step(M: Tensor, M0: Tensor, f: Tensor, u: Tensor, eta: Tensor, alpha: Tensor, rule: Rule, erase: str) -> Tensor:
    """One write of u at key f into one matrix M (B, H, in, out)."""
    eta, alpha = eta[..., None, None], alpha[..., None, None]
    rest = M0 if rule.decay_to == "initial" else torch.zeros_like(M0)
    decayed = rest + alpha * (M - rest)
    erased = {"decayed": decayed, "undecayed": M, "none": torch.zeros_like(M)}[erase]
    kept = decayed - eta * f[..., :, None] @ (f[..., None, :] @ erased)
    return kept + eta * f[..., :, None] * u[..., None, :]


def gate(M: Matrices, z: Tensor, features: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The slow head of an η or α memory: (B, H)."""
    return (call(M, z, features) * weight).sum(-1) + bias


def apply(M: Tensor, z: Tensor) -> Tensor:
    """Mᵀ z for M (B, H, in, out), z (B, H, in)."""
    return (z[..., None, :] @ M)[..., 0, :]


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + 1e-6)."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def pick(mask: Tensor, a: dict[str, Matrices], b: dict[str, Matrices]) -> dict[str, Matrices]:
    """The memories of a in the rows where mask (B,), else those of b."""
    mask = mask.view(-1, 1, 1, 1)
    return {n: [torch.where(mask, x, y) for x, y in zip(a[n], b[n], strict=True)] for n in a}
