"""levels(): the boxes of any module and any optimizer, found by looking at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nestling.core.level import Level
from nestling.introspect import deep_optimizers, modules
from nestling.introspect.box import Box, Boxes
from nestling.introspect.optimizers import COUNTERS, SURPRISE, Description, Group, Kept, describe
from nestling.optim import MultiLevel

UNKNOWN = Description(rule="not known", half_life=None)


@runtime_checkable
class Declares(Protocol):
    """What declares its own levels: our layers and models, or anybody's."""

    def levels(self) -> Iterable[Level]:
        """The levels it consists of."""
        ...


def levels(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Boxes:
    """The associative memories of `module`, and of the optimizer that trains it, ordered fast to slow.

    A module (or submodule) with a method `levels()` is taken at its word. Otherwise softmax attention is a box that
    is re-solved at every read (period 0), recurrent layers are written at every token, running statistics of
    normalisation and all parameters on the step clock. Attention in foreign code is recognised by a class name that
    ends in "Attention" or by a forward that calls `scaled_dot_product_attention`; other memories inside foreign
    modules are not seen. Each parameter belongs to one box, shared ones to the first.

    With an optimizer, one more box per parameter group says how the weights are written, and one per memory that the
    optimizer keeps. Parameters it does not hold are never written (period inf).

    Raises ValueError if the optimizer holds parameters that are not the module's.
    """
    written = None if optimizer is None else held(optimizer, module)
    boxes = list(of_module(module, written))
    if optimizer is not None:
        boxes += of_optimizer(optimizer)
    return Boxes(boxes)


def held(optimizer: torch.optim.Optimizer, module: nn.Module) -> set[int]:
    """The identities of the parameters that the optimizer writes."""
    ours = {id(p) for p in module.parameters()}
    written = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if written - ours:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} holds {len(written - ours)} parameters that are not the module's; "
            "pass the module it was made for"
        )
    return written


def of_module(root: nn.Module, written: set[int] | None) -> Iterator[Box]:
    """The boxes of a module; what declares its levels is not looked into, attention inside attention counts once."""
    declared: list[str] = []
    attention: list[str] = []
    seen: set[int] = set()
    for path, module in root.named_modules():
        if under(path, declared):
            continue
        name = path or type(module).__name__
        if isinstance(module, Declares):
            declared.append(path)
            yield from declared_boxes(path, root.get_submodule(path), module.levels(), seen)
            continue
        if not under(path, attention):
            yield from modules.memories(name, module)
        if modules.is_attention(module):
            attention.append(path)
        yield from modules.parameters(name, module, written, seen)


def under(path: str, above: list[str]) -> bool:
    """Whether a module path lies inside one of the paths `above` (the root's path is empty)."""
    return any(top == "" or path.startswith(f"{top}.") for top in above)


def declared_boxes(path: str, module: nn.Module, declared: Iterable[Level], seen: set[int]) -> Iterator[Box]:
    """What a module declares, and its parameters that no level of it owns."""
    boxes = [Box.of(level, prefix=path) for level in declared]
    yield from boxes
    own = [p for p in module.parameters() if id(p) not in seen]
    seen |= {id(p) for p in own}
    rest = sum(p.numel() for p in own) - sum(box.parameters for box in boxes)
    if rest > 0:
        yield Box(
            name=f"{path or type(module).__name__}: the rest", memory="projections, norms and other parameters",
            objective=SURPRISE, rule="written by the optimizer", clock="step", period=1, parameters=rest,
            transfer="backpropagation", state_bytes=None, elements=rest,
        )  # fmt: skip


def of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[Box]:
    """The boxes of an optimizer: the weights of each group, and each memory it keeps for them."""
    several = len(optimizer.param_groups) > 1
    for index, group in enumerate(optimizer.param_groups):
        prefix = f"{type(optimizer).__name__}.{index}" if several else type(optimizer).__name__
        params = [p for p in group["params"] if p.requires_grad]
        known = described(optimizer, group | {"steps_taken": steps_taken(optimizer, params)})
        kept = known.kept if known else ()
        yield weights_box(prefix, params, known or UNKNOWN)
        yield from (kept_box(prefix, memory, params) for memory in kept)
        yield from observed_boxes(prefix, optimizer, params, {key for memory in kept for key in memory.keys})


def described(optimizer: torch.optim.Optimizer, group: Group) -> Description | None:
    """What is known of how an optimizer treats a group; the groups of a MultiLevel name their level."""
    if isinstance(optimizer, MultiLevel):
        inner = described(optimizer.optimizers[group["level"]], group)
        return deep_optimizers.slowed(inner or UNKNOWN, group["level_period"])
    return deep_optimizers.describe(optimizer, group) or describe(optimizer, group)


def steps_taken(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> float:
    """How many steps a group has behind it, as far as its state tells."""
    return max((float(optimizer.state[p].get("step", 0)) for p in params if p in optimizer.state), default=0.0)


def weights_box(prefix: str, params: list[Tensor], known: Description) -> Box:
    """The weights of a group as the memory that the optimizer's rule writes; the module's boxes own them."""
    return on_step_clock(
        name=f"{prefix}.weights", memory="weights of the module", objective=SURPRISE, rule=known.rule,
        half_life=known.half_life, period=known.period,
        transfer="backpropagation", sizes=[p.numel() for p in params], itemsize=4,
    )  # fmt: skip


def kept_box(prefix: str, memory: Kept, params: list[Tensor]) -> Box:
    """One memory of gradients, with the counts that its hyper-parameters imply (it may not exist before a step)."""
    whole = torch.empty(sum(p.numel() for p in params), device="meta")
    sizes = [size for p in ([whole] if memory.whole_group else params) for size in memory.sizes(p)]
    return on_step_clock(
        name=f"{prefix}.{memory.name}", memory=memory.memory, objective=memory.objective, rule=memory.rule,
        half_life=memory.half_life, period=memory.period, transfer="generation: the module's gradients are its data",
        sizes=sizes, itemsize=max((p.element_size() for p in params), default=4),
    )  # fmt: skip


def observed_boxes(
    prefix: str, optimizer: torch.optim.Optimizer, params: list[Tensor], known: set[str]
) -> Iterator[Box]:
    """State tensors that no entry speaks of, as they are found after a step; nothing is known of their rule."""
    found: dict[str, list[Tensor]] = {}
    for p in params:
        for key, value in optimizer.state.get(p, {}).items():
            if key not in known | COUNTERS:
                found.setdefault(key, []).extend(tensors_of(value))
    for key, tensors in found.items():
        if tensors:
            yield on_step_clock(
                name=f"{prefix}.{key}", memory="state tensors, as observed", objective="not known", rule="not known",
                half_life=None, transfer="generation: the module's gradients are its data",
                sizes=[x.numel() for x in tensors], itemsize=tensors[0].element_size(),
            )  # fmt: skip


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in an entry of an optimizer's state: itself, or the items of a list or dictionary."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for part in parts for x in tensors_of(part)]


def on_step_clock(*, sizes: list[int], itemsize: int, **said: Any) -> Box:
    """A box of the step clock that changes tensors of these sizes, at every step unless said, and owns no parameter."""
    total = sum(sizes)
    return Box(
        clock="step",
        parameters=0,
        tensors=len(sizes),
        elements=total,
        state_bytes=total * itemsize,
        **{"period": 1, **said},
    )
