"""Titans' neural long-term memory as the token loop, with an explicit chunk anchor.

Written from the equations, independently of chunk.py: every memory is an explicit matrix, every token one step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


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
    normalized: bool = False,
    count: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Write one memory per row and head by the gradient of its own error, and read it.

        S_t = mu_t S_{t-1} - eta_t grad 1/2 |M_a(k_t) - v_t|^2       a = last token before t's chunk
        M_t = alpha_t M_{t-1} + S_t,   y_t = M_t(q_t)                the read of a token sees its own write

    q, k, v       (B, T, H, K), one width. k of unit norm and eta in [0, 1] keep chunk_size 1 stable; longer chunks
                  sum their gradients
    eta           (B, T, H) write rate;  log_decay (B, T, H) log alpha <= 0, None = 0 (nothing is forgotten)
    log_momentum  (B, T, H) log mu <= 0, None = no momentum
    weights       initial memory, shared by rows: (W,) with W (H, K, K) is M(z) = W^T z; (W2, W1) with W2 (H, K, F),
                  W1 (H, F, K) is M(z) = z + W1^T silu(W2^T z)
    decay_to      "zero": alpha keeps a fraction of the whole weight, as printed; "initial": of its deviation
    normalized    eta is divided by max(1, c / 2), c = |gradient|^2 / |error|^2 the curvature of the token's loss along
                  its gradient: with rates of a chunk that sum to at most 1 a write does not overshoot twice its error
    state         what an earlier call returned, None = fresh: M_a - weights for each matrix, (B, H, in, out), then
                  M - weights after the last token, then, with momentum, S after the last token
    count         (B,) tokens of the chunk that is open, below chunk_size; None = 0, token 0 opens a chunk
    lengths       (B,) real tokens per row; the rest is padding
    Returns y (B, T, H, K) in v's dtype, and the state. The new count is (count + lengths) % chunk_size.
    Source: [Titans] (8)-(14), paper (89); docs/equations.md. Raises ValueError for shapes that do not fit.
    """
    check(k, weights, state, log_momentum is not None, chunk_size, decay_to)
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        B, T, H, _ = v.shape
        initial = [w.to(dtype).expand(B, *w.shape) for w in weights]
        rest = initial if decay_to == "initial" else [torch.zeros_like(w) for w in initial]
        anchor = memory = initial
        surprise = [torch.zeros_like(w) for w in initial]
        if state is not None:
            parts = [state[i : i + len(weights)] for i in range(0, len(state), len(weights))]
            anchor, memory = ([w + d.to(dtype) for w, d in zip(initial, part, strict=True)] for part in parts[:2])
            surprise = surprise if log_momentum is None else [s.to(dtype) for s in parts[2]]
        count = torch.zeros(B, dtype=torch.long, device=v.device) if count is None else count
        outputs = []
        for t in range(T):
            real = torch.ones_like(count, dtype=torch.bool) if lengths is None else lengths.to(count.device) > t
            gradients, curvature = gradient(anchor, k[:, t].to(dtype), v[:, t].to(dtype))
            rate, mu, alpha = eta[:, t].to(dtype), at(log_momentum, t, 0.0, dtype), at(log_decay, t, 1.0, dtype)
            if normalized:
                rate = rate / (curvature / 2).clamp_min(1)
            driven = [mu * s - rate[..., None, None] * g for s, g in zip(surprise, gradients, strict=True)]
            kept = [r + alpha * (m - r) for r, m in zip(rest, memory, strict=True)]
            grown = [m + s for m, s in zip(kept, driven, strict=True)]
            outputs.append(call(grown, q[:, t].to(dtype)))
            memory, surprise = pick(real, grown, memory), pick(real, driven, surprise)
            count = count + real
            anchor = pick(real & (count % chunk_size == 0), memory, anchor)
        y = torch.stack(outputs, 1) if outputs else v
        ends = [m - w for M in (anchor, memory) for m, w in zip(M, initial, strict=True)]
        return y.to(v.dtype), (*ends, *(surprise if log_momentum is not None else ()))


def call(M: list[Tensor], z: Tensor) -> Tensor:
    """M(z) for z (B, H, K)."""
    if len(M) == 1:
        return torch.einsum("bhk,bhkv->bhv", z, M[0])
    return z + torch.einsum("bhf,bhfv->bhv", F.silu(torch.einsum("bhk,bhkf->bhf", z, M[0])), M[1])


def gradient(M: list[Tensor], k: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradient of 1/2 |M(k) - v|^2 with respect to each matrix, and their |gradient|^2 / |error|^2 (B, H)."""
    error = call(M, k) - v
    if len(M) == 1:
        made = [k[..., :, None] * error[..., None, :]]
    else:
        a = torch.einsum("bhk,bhkf->bhf", k, M[0])
        s = torch.sigmoid(a)
        back = torch.einsum("bhv,bhfv->bhf", error, M[1]) * s * (1 + a * (1 - s))
        made = [k[..., :, None] * back[..., None, :], F.silu(a)[..., :, None] * error[..., None, :]]
    squares = torch.stack([g.square().sum((-2, -1)) for g in made]).sum(0)
    return made, squares / error.square().sum(-1).clamp_min(torch.finfo(error.dtype).tiny)


def at(log: Tensor | None, t: int, otherwise: float, dtype: torch.dtype) -> Tensor | float:
    """exp(log_t) as (B, H, 1, 1)."""
    return otherwise if log is None else log[:, t, :, None, None].to(dtype).exp()


def pick(mask: Tensor, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """a in the rows where mask (B,), else b."""
    return [torch.where(mask.to(x.device).view(-1, 1, 1, 1), x, y) for x, y in zip(a, b, strict=True)]


def check(
    k: Tensor, weights: tuple[Tensor, ...], state: tuple[Tensor, ...] | None, momentum: bool, chunk_size: int, to: str
) -> None:
    """One line for what cannot work."""
    if chunk_size < 1 or to not in ("zero", "initial"):
        raise ValueError(f'chunk_size={chunk_size}, decay_to={to!r}; need chunk_size >= 1 and "zero" or "initial"')
    width = k.shape[-1]
    if len(weights) not in (1, 2) or weights[0].shape[-2] != width or weights[-1].shape[-1] != width:
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"weights are {shapes}; need one or two matrices that map width {width} to width {width}")
    needed = len(weights) * (3 if momentum else 2)
    if state is not None and len(state) != needed:
        raise ValueError(f"state holds {len(state)} tensors, need {needed}: was it made with and without momentum?")
