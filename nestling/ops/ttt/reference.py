"""TTT-Linear and TTT-MLP as the token loop: each write is the gradient that autograd finds of the memory's error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # of the norm inside the memory


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    *,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    state: tuple[Tensor, ...] | None = None,
    chunk_size: int = 16,
    count: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Train one memory per row and head on its keys and values, and ask it the queries.

        M_t = M_{t-1} - eta_t grad 1/2 |f(M_a; k_t) - v_t|^2         a = last token before t's chunk
        f(M; z) = z + LN(g(M; z)),   y_t = f(M_t; q_t)               the read of a token sees its own write

    q, k, v   (B, T, H, K), one width;  eta (B, T, H) write rate
    weights   initial memory, shared by rows; the last row of each matrix is its bias. (W,) with W (H, K+1, K) is
              g(z) = W^T [z, 1]; (W1, W2), W1 (H, K+1, F), W2 (H, F+1, K), is g(z) = W2^T [gelu(W1^T [z, 1]), 1]
    norm      scale and shift (H, K) of LN, which no token writes
    state     what an earlier call returned, None = fresh: M_a - weights for each matrix, (B, H, in, out), then
              M - weights after the last token
    count     (B,) tokens of the chunk that is open, below chunk_size; None = 0. lengths (B,): real tokens per row
    Returns y (B, T, H, K) in v's dtype, and the state. The new count is (count + lengths) % chunk_size.
    Source: Sun et al., arXiv 2407.04620; docs/equations.md. Raises ValueError for shapes that do not fit.
    """
    check(k, weights, norm, state, chunk_size)
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        B, T = v.shape[:2]
        initial = [w.to(dtype).expand(B, *w.shape) for w in weights]
        anchor = memory = initial
        if state is not None:
            parts = state[: len(weights)], state[len(weights) :]
            anchor, memory = ([w + d.to(dtype) for w, d in zip(initial, part, strict=True)] for part in parts)
        count = torch.zeros(B, dtype=torch.long, device=v.device) if count is None else count
        outputs = []
        for t in range(T):
            real = torch.ones_like(count, dtype=torch.bool) if lengths is None else lengths.to(count.device) > t
            gradients = gradient(anchor, norm, k[:, t].to(dtype), v[:, t].to(dtype))
            rate = eta[:, t, :, None, None].to(dtype)
            grown = [m - rate * g for m, g in zip(memory, gradients, strict=True)]
            outputs.append(call(grown, norm, q[:, t].to(dtype)))
            memory = pick(real, grown, memory)
            count = count + real
            anchor = pick(real & (count % chunk_size == 0), memory, anchor)
        y = torch.stack(outputs, 1) if outputs else v
        return y.to(v.dtype), tuple(m - w for M in (anchor, memory) for m, w in zip(M, initial, strict=True))


def call(M: list[Tensor], norm: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
    """f(M; z) for z (B, H, K)."""
    y = z
    for i, W in enumerate(M):
        y = F.gelu(y, approximate="tanh") if i else y
        y = torch.einsum("bhk,bhkv->bhv", F.pad(y, (0, 1), value=1.0), W)
    scale, shift = (p.to(z.dtype) for p in norm)
    return z + F.layer_norm(y, y.shape[-1:], eps=EPS) * scale + shift


def gradient(M: list[Tensor], norm: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
    """Gradient of 1/2 |f(M; k) - v|^2 with respect to each matrix, itself differentiable where grad is on."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        held = [W if W.requires_grad else W.detach().requires_grad_() for W in M]
        loss = (call(held, norm, k) - v).square().sum() / 2
        return list(torch.autograd.grad(loss, held, create_graph=outer))


def pick(mask: Tensor, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """a in the rows where mask (B,), else b."""
    return [torch.where(mask.to(x.device).view(-1, 1, 1, 1), x, y) for x, y in zip(a, b, strict=True)]


def check(
    k: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    state: tuple[Tensor, ...] | None,
    chunk_size: int,
) -> None:
    """One line for what cannot work."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    width = k.shape[-1]
    if len(weights) not in (1, 2) or weights[0].shape[-2] != width + 1 or weights[-1].shape[-1] != width:
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"weights are {shapes}; need one or two matrices, a row more than inputs, {width} to {width}")
    if any(p.shape != weights[0].shape[:1] + (width,) for p in norm):
        raise ValueError(f"norm has shapes {[tuple(p.shape) for p in norm]}; need (heads, {width}) twice")
    if state is not None and len(state) != 2 * len(weights):
        raise ValueError(f"state holds {len(state)} tensors, need {2 * len(weights)}; pass what a call returned")
