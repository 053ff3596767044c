"""Muon is momentum that is read through Newton-Schulz: a linear memory with a non-linear output, (42), (52)."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.newton_schulz import QUINTIC
from nestling.optim.base import Group, Params, State, decay_weights
from nestling.optim.orthogonal import MatrixOptimizer, add_scaled, nesterov, orthogonalize


class Muon(MatrixOptimizer):
    """m <- momentum m + (1 - momentum) g, W <- (1 - lr weight_decay) W - lr' NewtonSchulz(m): torch.optim.Muon.

    For hidden matrices; embeddings, heads, biases and gains belong to AdamW (`param_groups`). Arguments and defaults
    are torch.optim.Muon's, and so is lr' = lr sqrt(max(1, out / in)), or 0.2 lr sqrt(max(out, in)) for
    adjust_lr_fn="match_rms_adamw", with which AdamW's rates and decays carry over. With nesterov
    g + momentum (m - g) is read. Convolution kernels are read as (out, in ...).

    Here besides: matrices of equal shape are orthogonalised together, and `ns_dtype` ("float32", "bfloat16") says in
    what; None is the fastest of the device for float32, and float64 for float64.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: str | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults: Group = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        super().__init__(params, {**defaults, "adjust_lr_fn": adjust_lr_fn}, foreach)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not 0 <= group["momentum"] <= 1:
            raise ValueError(f"momentum is {group['momentum']}; use the kept part, 0 ... 1")

    def init(self, p: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group) -> None:
        m, beta = [state["momentum_buffer"] for state in states], group["momentum"]
        torch._foreach_lerp_(m, grads, 1 - beta)
        read = nesterov(grads, m, beta) if group["nesterov"] else m
        decay_weights(params, group)
        add_scaled(params, orthogonalize(read, group, group["eps"]), group)
