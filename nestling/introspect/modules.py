"""What the layers of torch.nn, and attention in foreign code, remember; and who writes their parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nestling.introspect.box import Box
from nestling.introspect.optimizers import SURPRISE, half_life

RECURRENT = {
    "LSTM": ("hidden and cell vector", "input, forget and output gates"),
    "GRU": ("hidden vector", "update and reset gates"),
    "RNN": ("hidden vector", "overwrite: φ(U x + W h)"),
}


def memories(name: str, module: nn.Module) -> Iterator[Box]:
    """The box of what the module remembers besides its parameters, if anything."""
    if is_attention(module):
        yield Box(
            name=f"{name}.attention", memory="softmax attention", objective="Σ s(k, q) ‖v − M‖²",
            rule="closed form: Nadaraya-Watson", clock="token", period=0, parameters=0, transfer="backpropagation",
            state_bytes=None,
        )  # fmt: skip
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        memory, rule = RECURRENT[type(module).__name__.removesuffix("Cell")]
        yield Box(
            name=f"{name}.state", memory=memory, objective="none stated", rule=rule, clock="token", period=1,
            parameters=0, transfer="backpropagation", state_bytes=recurrent_bytes(module),
        )  # fmt: skip
    elif isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None:
        yield running_statistics(name, module)


def is_attention(module: nn.Module) -> bool:
    """Whether the module is softmax attention, by its class name or by what its forward calls."""
    calls = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    return (
        isinstance(module, nn.MultiheadAttention)
        or type(module).__name__.endswith("Attention")
        or "scaled_dot_product_attention" in calls
    )


def recurrent_bytes(module: nn.RNNBase | nn.RNNCellBase) -> int:
    """Bytes of the state of one row."""
    itemsize = next(module.parameters()).element_size()
    if isinstance(module, nn.RNNCellBase):
        return itemsize * module.hidden_size * (2 if isinstance(module, nn.LSTMCell) else 1)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    width = (module.proj_size or module.hidden_size) + (module.hidden_size if module.mode == "LSTM" else 0)
    return itemsize * layers * width


def running_statistics(name: str, module: _NormBase) -> Box:
    """Mean and variance over past batches: a memory written once per training step."""
    m = module.momentum
    kept = [x for x in (module.running_mean, module.running_var) if x is not None]
    elements = sum(x.numel() for x in kept)
    return Box(
        name=f"{name}.running statistics", memory="diagonal linear memory", objective="½‖m − statistic of the batch‖²",
        rule="m ← running mean of all batches" if m is None else f"m ← {1 - m:g} m + {m:g} statistic of the batch",
        clock="step", period=1, parameters=0, half_life=None if m is None else half_life(1 - m), transfer="direct",
        state_bytes=elements * kept[0].element_size(), tensors=len(kept), elements=elements,
    )  # fmt: skip


def parameters(name: str, module: nn.Module, written: set[int] | None, seen: set[int]) -> Iterator[Box]:
    """The boxes of the module's own parameters: those that an optimizer writes, and those that stay.

    `written` holds the identities of the optimizer's parameters (None: any that asks for gradients); `seen` those
    that a box owns already, and is added to.
    """
    own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    seen |= {id(p) for p in own}
    moving = [p for p in own if p.requires_grad and (written is None or id(p) in written)]
    fixed = [p for p in own if not any(p is q for q in moving)]
    if moving:
        yield parameter_box(name, module, moving, period=1, rule="written by the optimizer")
    if fixed:
        yield parameter_box(f"{name}.frozen" if moving else name, module, fixed, period=math.inf, rule="never written")


def parameter_box(name: str, module: nn.Module, params: Sequence[Tensor], *, period: float, rule: str) -> Box:
    """The box of parameters that share a fate."""
    total = sum(p.numel() for p in params)
    return Box(
        name=name, memory=f"{type(module).__name__} {shapes(params)}", objective=SURPRISE, rule=rule, clock="step",
        period=period, parameters=total, transfer="backpropagation", tensors=len(params), elements=total,
        state_bytes=sum(p.numel() * p.element_size() for p in params),
    )  # fmt: skip


def shapes(params: Sequence[Tensor]) -> str:
    """The shape of the largest parameter, e.g. 64×256."""
    largest = max(params, key=Tensor.numel)
    return "×".join(map(str, largest.shape)) or "scalar"
