"""The delta rule in chunks: one unit-triangular solve per chunk gives all its writes at once (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, initial_state: Tensor | None = None, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """The same numbers as reference.delta_rule for every chunk_size; shapes and results as there."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token")
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        T = v.shape[1]
        size = min(chunk_size, max(T, 1))
        q, k, x = (_chunks(y.to(dtype), size) for y in (q, k, v))  # (B, H, N, C, *)
        rate = _chunks(beta.to(dtype)[..., None], size)  # (B, H, N, C, 1)
        system = (rate * (k @ k.mT)).tril(-1)
        rhs = rate * torch.cat([x, k], -1)
        values, reads = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True).split(
            [x.shape[-1], k.shape[-1]], -1
        )
        scores = (q @ k.mT).tril()
        M = k.new_zeros(k.shape[0], k.shape[1], k.shape[-1], x.shape[-1])
        M = M if initial_state is None else initial_state.to(dtype)
        outputs = []
        for n in range(k.shape[2]):
            u = values[:, :, n] - reads[:, :, n] @ M  # what each token writes at its key
            outputs.append(q[:, :, n] @ M + scores[:, :, n] @ u)
            M = M + k[:, :, n].mT @ u
        return torch.cat(outputs, 2)[:, :, :T].transpose(1, 2).to(v.dtype), M


def _chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, D) -> (B, H, N, C, D), at least one chunk; zeros fill the last, which writes nothing."""
    missing = -x.shape[1] % size if x.shape[1] else size
    return F.pad(x, (0, 0, 0, 0, 0, missing)).transpose(1, 2).unflatten(2, (-1, size))
