"""The gated delta rule by the kernels of flash-linear-attention, for comparison and for who has it installed."""

from __future__ import annotations

from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The numbers of reference.gated_delta_rule in bfloat16; fla fixes its own chunk, so chunk_size changes nothing."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    start = None if initial_state is None else initial_state.float()
    return chunk_gated_delta_rule(
        q, k, v, g.float(), beta.to(v.dtype), scale=1.0, initial_state=start, output_final_state=True
    )
