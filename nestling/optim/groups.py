"""Which parameter is written by which optimizer, at which period: decided by name, checked, and printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nestling.optim.multilevel import MultiLevel
from nestling.optim.muon import Muon


@dataclass(frozen=True)
class Assign:
    """The parameters whose names match `pattern` (* is any text) form a level of one optimizer and one period."""

    pattern: str
    optimizer: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the optimizer: lr, weight_decay, ...
    period: float = 1  # steps between writes
    level: str = ""  # its name; "" is the pattern


def param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    assign: Sequence[Assign] | None = None,
    *,
    matrices: Callable[..., torch.optim.Optimizer] = Muon,
    weight_decay: float = 0.1,
    **options: Any,
) -> MultiLevel:
    """One optimizer for a whole model, in one call. Prints as a table.

    Without `assign`, hidden matrices go to `matrices` (Muon, M3, or what makes an optimizer of the same arguments; with
    `options`) and everything else to AdamW, both at a rate and decay in AdamW's units; vectors and scalars do not
    decay. Hidden is what has two dimensions, or is the kernel of a convolution without groups, and is neither in an
    embedding nor the model's last matrix (its head).
    With `assign` the first pattern that matches a name decides, and lr is what an entry without lr uses. Parameters
    that ask for no gradient are left out.
    Raises ValueError if a parameter matches no pattern, or a pattern decides about no parameter.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if assign is not None:
        return MultiLevel(dict(assigned(named, assign, lr)))
    inside = hidden(model)
    parts: dict[str, dict[str, Tensor]] = {"hidden matrices": {}, "other": {}, "vectors": {}}
    for name, p in named.items():
        parts["hidden matrices" if id(p) in inside else "other" if p.dim() > 1 else "vectors"][name] = p
    levels: dict[str, tuple[torch.optim.Optimizer, float]] = {}
    if parts["hidden matrices"]:
        options = {"adjust_lr_fn": "match_rms_adamw", **options}
        made = matrices(list(parts["hidden matrices"].items()), lr=lr, weight_decay=weight_decay, **options)
        levels["hidden matrices"] = made, 1
    rest = [(parts["other"], weight_decay), (parts["vectors"], 0.0)]
    groups = [{"params": list(part.items()), "weight_decay": decay} for part, decay in rest if part]
    if groups:
        levels["the rest"] = torch.optim.AdamW(groups, lr=lr), 1
    return MultiLevel(levels)


def assigned(
    named: Mapping[str, Tensor], assign: Sequence[Assign], lr: float
) -> Iterator[tuple[str, tuple[torch.optim.Optimizer, float]]]:
    """A level for each entry, with the parameters that it is the first to match."""
    left = dict(named)
    levels: set[str] = set()
    for entry in assign:
        level = entry.level or entry.pattern
        if level in levels:
            raise ValueError(f'level "{level}" is given twice; join the patterns, or name the levels differently')
        levels.add(level)
        matched = {name: left.pop(name) for name in list(left) if fnmatchcase(name, entry.pattern)}
        if not matched:
            raise ValueError(
                f'pattern "{entry.pattern}" is the first to match no parameter of the model; names look like '
                f"{', '.join(list(named)[:3])}: correct it, or take it out"
            )
        optimizer = entry.optimizer(list(matched.items()), **{"lr": lr, **entry.options})
        yield level, (optimizer, entry.period)
    if left:
        raise ValueError(f'no pattern matches {", ".join(left)}; end with Assign("*", torch.optim.AdamW)')


def hidden(model: nn.Module) -> set[int]:
    """The identities of the hidden matrices of a model."""
    found: list[Tensor] = []
    outside: set[int] = set()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                outside.add(id(p))
            if is_matrix(module, p):
                found.append(p)
    return {id(p) for p in found[:-1]} - outside - {id(p) for p in found[-1:]}


def is_matrix(module: nn.Module, p: Tensor) -> bool:
    """Whether a parameter of this module maps all of its inputs to all of its outputs."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return p.dim() > 2 and module.groups == 1
    return p.dim() == 2 and "conv" not in type(module).__name__.lower()
