"""The default rule's writes as GPU kernels: fused.py's `write_chunks` with everything inside a chunk on chip.

triton_forward.py and triton_backward.py hold the kernels; everything else is chunk.py, whose reads are batched products
over all chunks and fill a GPU by themselves. Tensors are float32; `torch.set_float32_matmul_precision` chooses what
their products run in on tensor cores: "highest" three TF32 products, "high" TF32, "medium" bfloat16. Sums, states,
gates and triangular systems are float32 throughout (the systems in TF32 below "highest").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nestling.ops.self_modifying import chunk, triton_backward, triton_forward
from nestling.ops.self_modifying.derivatives import differentiable, learns
from nestling.ops.self_modifying.fused import Results

Given = tuple[Tensor | None, ...]


def write_chunks(
    plain: Callable[..., Results], full: Tensor | None, chunk_size: int, eta_max: float, *tensors: Tensor | None
) -> Results:
    """As fused.write_chunks, for the five memories of given queries; without gradients only E[-1] is kept of states."""
    return _WriteChunks.apply(plain, full, chunk_size, eta_max, learns(*tensors), *tensors)


self_modifying = partial(chunk.self_modifying, writer=write_chunks)


class _WriteChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plain: Callable, full: Tensor | None, C: int, eta_max: float, keep: bool, *tensors: Tensor | None
    ) -> Results:
        inputs = _inputs(full, C, *tensors)
        E = tensors[-1]
        assert E is not None
        B, H, F, M, V = E.shape
        N = inputs[0].shape[2]
        states = E.new_empty(B, H, N + 1 if keep else 2, M, F, V)
        states[:, :, 0] = E.transpose(2, 3)
        keys, values, decay, starts = (states.new_empty(B, H, N, *shape) for shape in ((C, F), (C, V), (C,), (F, V)))
        sizes = {"N": N, "B": B, "H": H, "C": C, "F": F, "V": V, "has_features": tensors[2] is not None}
        triton_forward.forward[(B * H,)](
            *inputs, states, keys, values, decay, starts, eta_max, **sizes, keep=keep, **_options(F, V)
        )
        if keep:
            ctx.options = plain, full, C, eta_max, len(tensors)
            ctx.save_for_backward(*tensors, states)
        return keys, values, decay, starts, states[:, :, N if keep else N % 2].transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Given:
        plain, full, C, eta_max, given = ctx.options
        *tensors, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None,) * 5 + differentiable(plain, (full, C, eta_max), tuple(tensors), grads)
        *outer, d_final = grads
        dE = d_final.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        inputs = _inputs(full, C, *tensors)
        B, H, M, F, V = dE.shape
        dz = torch.empty_like(inputs[0])
        d_initial, d_features, d_gate_weight, d_gate_bias, d_rates = total = [
            dE.new_zeros(B, H, *shape) for shape in ((M, F, V), (V, F), (2, V), (2,), (M,))
        ]
        sizes = {"N": dz.shape[2], "B": B, "H": H, "C": C, "F": F, "V": V, "has_features": tensors[2] is not None}
        outer = [g.contiguous() for g in outer]
        triton_backward.backward[(B * H,)](*inputs, states, *outer, dz, *total, dE, eta_max, **sizes, **_options(F, V))
        found = (
            dz.flatten(2, 3),
            d_initial.sum(0).transpose(1, 2),
            d_features.sum(0),
            d_gate_weight.sum(0).transpose(0, 1),
            d_gate_bias.sum(0).transpose(0, 1),
            d_rates.sum(0),
            dE.transpose(2, 3),
        )
        return (None,) * 5 + tuple(None if t is None else g for t, g in zip(tensors, found, strict=True))


def _inputs(full: Tensor | None, C: int, *tensors: Tensor | None) -> list[Tensor]:
    """What both kernels read, laid out as they expect it: z, initial, features, gates, rates, full."""
    z, initial, features, gate_weight, gate_bias, rates, _ = tensors
    assert z is not None and initial is not None
    N = z.shape[2] // C
    if full is None:
        full = z.new_ones(N, z.shape[0], dtype=torch.bool)
    laid_out = z.unflatten(2, (N, C)), initial.transpose(1, 2), features, gate_weight, gate_bias, rates, full
    return [initial if t is None else t.contiguous() for t in laid_out]


def _options(F: int, V: int) -> dict[str, Any]:
    """How a kernel is compiled. One stage: loads must not overtake the stores of the chunk before."""
    exactness = torch.get_float32_matmul_precision()
    return {
        "operand": tl.bfloat16 if exactness == "medium" else tl.float32,
        "precision": "tf32x3" if exactness == "highest" else "tf32",
        "num_warps": 4 if F * V <= 4096 else 8,
        "num_stages": 1,
    }
