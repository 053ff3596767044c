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
        E = tensors[-1]
        assert E is not None
        B, H, F, M, V = E.shape
        shared = _shared(full, C, eta_max, *tensors)
        N = shared["N"]
        states = E.new_empty(B, H, N + 1 if keep else 2, M, F, V)
        states[:, :, 0] = E.transpose(2, 3)
        shapes = {"keys": (C, F), "values": (C, V), "decay": (C,), "starts": (F, V)}
        results = {name: states.new_empty(B, H, N, *shape) for name, shape in shapes.items()}
        triton_forward.forward[(B * H,)](**shared, **results, states=states, keep=keep)
        if keep:
            ctx.options = plain, full, C, eta_max
            ctx.save_for_backward(*tensors, states)
        keys, values, decay, starts = results.values()
        return keys, values, decay, starts, states[:, :, N if keep else N % 2].transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Given:
        plain, full, C, eta_max = ctx.options
        *tensors, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None,) * 5 + differentiable(plain, (full, C, eta_max), tuple(tensors), grads)
        B, H, F, M, V = grads[-1].shape
        outer = {name: g.contiguous() for name, g in zip(("keys", "values", "decay", "starts"), grads, strict=False)}
        dE = grads[-1].transpose(2, 3).clone(memory_format=torch.contiguous_format)
        shapes = {"initial": (M, F, V), "features": (V, F), "gate_weight": (2, V), "gate_bias": (2,), "rates": (M,)}
        total = {name: dE.new_zeros(B, H, *shape) for name, shape in shapes.items()}  # a program adds to its own
        shared = _shared(full, C, eta_max, *tensors)
        dz, dv = torch.empty_like(shared["z"]), dE.new_empty(B, H, C, V)
        d = {f"d_{name}": g for name, g in (outer | total).items()}
        triton_backward.backward[(B * H,)](**shared, **d, states=states, dz=dz, dv=dv, dE=dE)
        initial, features, *gates, rates = (g.sum(0) for g in total.values())
        found = (
            dz.flatten(2, 3),
            initial.transpose(1, 2),
            features,
            *(g.transpose(0, 1) for g in gates),
            rates,
            dE.transpose(2, 3),
        )
        return (None,) * 5 + tuple(None if t is None else g for t, g in zip(tensors, found, strict=True))


def _shared(full: Tensor | None, C: int, eta_max: float, *tensors: Tensor | None) -> dict[str, Any]:
    """What both kernels take by name: the inputs laid out as they expect them, scratch, sizes, and how to compile.

    One stage only: a pipelined loop would load a chunk's state before the chunk before it has stored it.
    """
    z, initial, features, gate_weight, gate_bias, rates, E = tensors
    assert z is not None and initial is not None and E is not None
    B, H, F, _, V = E.shape
    N = z.shape[2] // C
    given = {
        "z": z.unflatten(2, (N, C)),
        "initial": initial.transpose(1, 2),
        "features": initial if features is None else features,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "rates": rates,
        "full": z.new_ones(N, B, dtype=torch.bool) if full is None else full,
    }
    kv = E.new_empty(B, H, 2, C, V)
    scratch = {"kv": kv, "phi_kv": kv if features is None else E.new_empty(B, H, 2, C, F)}
    sizes = {"N": N, "B": B, "H": H, "C": C, "F": F, "V": V, "has_features": features is not None}
    exactness = torch.get_float32_matmul_precision()
    compiled = {
        "operand": tl.bfloat16 if exactness == "medium" else tl.float32,
        "precision": "tf32x3" if exactness == "highest" else "tf32",
        "num_warps": 4 if F * V <= 4096 else 8,
        "num_stages": 1,
    }
    laid_out = {name: t.contiguous() for name, t in given.items() if t is not None}
    return laid_out | scratch | sizes | compiled | {"eta_max": eta_max}
