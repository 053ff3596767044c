"""State trees: the value that a memory hands from one call to the next.

A tree is a tensor, None, a number, a string, a list, a dict with string keys, or a dataclass registered with
`state_class`. Two rules make every operation below generic, for any memory:

* every tensor is batch-first: row b of the batch is index b of dimension 0;
* what is ragged between rows (cache slots, pending tokens, ranks) lies along dimension 1, filled from the left,
  and padded **with zeros on the right**; so rows of different age stack.

A node may have a method `combined()`, which is called after rows of several states became one node.
None stands for "nothing yet" and equals zeros when it meets a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor

Tree = Any  # Tensor | None | int | float | str | list[Tree] | dict[str, Tree] | registered dataclass
T = TypeVar("T")

_REGISTRY: dict[str, type] = {}


@dataclass_transform(frozen_default=True)
def state_class(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that state trees, and their files, may contain."""
    made = dataclass(frozen=True)(cls)
    if made.__name__ in _REGISTRY:
        raise ValueError(f"state class {made.__name__!r} is registered already; choose another name")
    _REGISTRY[made.__name__] = made
    return made


def replace(node: T, **changes: Any) -> T:
    """The same node with some of its fields changed."""
    return type(node)(**{**vars(node), **changes})


def children(tree: Tree) -> dict[str, Tree] | None:
    """The named subtrees of a node, or None for a leaf."""
    if isinstance(tree, list):
        return {str(i): child for i, child in enumerate(tree)}
    if isinstance(tree, dict):
        return tree
    if is_dataclass(tree) and not isinstance(tree, type):
        return {f.name: getattr(tree, f.name) for f in fields(tree)}
    return None


def rebuild(tree: Tree, parts: dict[str, Tree]) -> Tree:
    """A node of the same kind as `tree` around new subtrees."""
    if isinstance(tree, list):
        return list(parts.values())
    return parts if isinstance(tree, dict) else type(tree)(**parts)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply `fn` to every tensor; everything else stays."""
    if isinstance(tree, Tensor):
        return fn(tree)
    parts = children(tree)
    return tree if parts is None else rebuild(tree, {name: map_tensors(fn, part) for name, part in parts.items()})


def map_nodes(kind: type | tuple[type, ...], fn: Callable[[Any], Tree], tree: Tree) -> Tree:
    """Apply `fn` to every node of a kind; everything else stays."""
    if isinstance(tree, kind):
        return fn(tree)
    parts = children(tree)
    return tree if parts is None else rebuild(tree, {name: map_nodes(kind, fn, part) for name, part in parts.items()})


def tensors(tree: Tree) -> Iterator[Tensor]:
    """Every tensor of the tree, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    for part in (children(tree) or {}).values():
        yield from tensors(part)


def detach(tree: Tree) -> Tree:
    """The same values without autograd history."""
    return map_tensors(lambda x: x.detach() if x.requires_grad else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """The same values on another device."""
    return map_tensors(lambda x: x.to(device), tree)


def nbytes(tree: Tree) -> int:
    """Bytes of all tensors."""
    return sum(x.numel() * x.element_size() for x in tensors(tree))


def select_rows(tree: Tree, index: Tensor | Sequence[int]) -> Tree:
    """Rows `index` of every tensor, as copies."""
    rows = torch.as_tensor(index, dtype=torch.long)
    return map_tensors(lambda x: x.index_select(0, rows.to(x.device)), tree)


def stack_rows(trees: Sequence[Tree], rows: Sequence[int]) -> Tree:
    """One tree whose rows are those of all `trees` in turn; `rows[i]` is the number of rows of `trees[i]`."""

    def cat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(_padded(parts))

    return _combine(cat, trees, rows)


def where_rows(mask: Tensor, a: Tree, b: Tree) -> Tree:
    """Row by row the row of `a` where mask (B,) is True, else that of `b`."""

    def pick(parts: Sequence[Tensor]) -> Tensor:
        x, y = _padded(parts)
        return torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, y)

    return _combine(pick, [a, b], [len(mask)] * 2)


def _combine(fn: Callable[[Sequence[Tensor]], Tensor], trees: Sequence[Tree], rows: Sequence[int]) -> Tree:
    """Apply `fn` to the tensors that stand in the same place of each tree."""
    model = next((t for t in trees if t is not None), None)
    if model is None:
        return None
    if isinstance(model, Tensor):
        return fn([_zeros_like_rows(model, n) if t is None else t for t, n in zip(trees, rows, strict=True)])
    parts = children(model)
    if parts is None:
        if any(t != model for t in trees if t is not None):
            raise ValueError(f"states differ in a constant ({list(trees)}); only states of one model combine")
        return model
    below = [children(t) or {} for t in trees]
    if isinstance(model, dict):  # a key that is missing on one side is "nothing yet" there
        parts = {name: None for b in below for name in b}
    elif any(b and b.keys() != parts.keys() for b in below):
        raise ValueError("states differ in structure; only states of one model combine")
    made = rebuild(model, {name: _combine(fn, [b.get(name) for b in below], rows) for name in parts})
    return made.combined() if hasattr(made, "combined") else made


def _zeros_like_rows(x: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, *x.shape[1:])


def _padded(parts: Sequence[Tensor]) -> list[Tensor]:
    """Pad dimension 1 with zeros on the right to the longest."""
    if parts[0].dim() < 2:
        return list(parts)
    longest = max(x.shape[1] for x in parts)
    return [pad_right(x, longest) for x in parts]


def pad_right(x: Tensor, length: int) -> Tensor:
    """x with dimension 1 filled up to `length` by zeros."""
    missing = length - x.shape[1]
    return x if missing == 0 else torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)


def flatten(tree: Tree) -> tuple[dict[str, Tensor], Any]:
    """The tensors by name, and a JSON-able skeleton that `unflatten` puts them back into."""
    named: dict[str, Tensor] = {}

    def walk(node: Tree, path: str) -> Any:
        if isinstance(node, Tensor):
            named[path] = node
            return {"tensor": path}
        parts = children(node)
        if parts is None:
            return {"value": node}
        below = {name: walk(part, f"{path}.{name}" if path else name) for name, part in parts.items()}
        if isinstance(node, list):
            return {"list": list(below.values())}
        return {"dict": below} if isinstance(node, dict) else {"class": type(node).__name__, "fields": below}

    return named, walk(tree, "")


def unflatten(named: dict[str, Tensor], skeleton: Any) -> Tree:
    """The tree that `flatten` took apart. Raises ValueError if the skeleton names what is not there."""
    match skeleton:
        case {"tensor": str(path)} if path in named:
            return named[path]
        case {"value": value}:
            return value
        case {"list": list(parts)}:
            return [unflatten(named, part) for part in parts]
        case {"dict": dict(parts)}:
            return {name: unflatten(named, part) for name, part in parts.items()}
        case {"class": str(name), "fields": dict(parts)} if name in _REGISTRY:
            return _REGISTRY[name](**{field: unflatten(named, part) for field, part in parts.items()})
    raise ValueError(f"not a state of this library: {str(skeleton)[:80]!r}; it is damaged or from another version")


def put_rows(tree: Tree, index: Tensor, part: Tree, rows: int) -> Tree:
    """`tree` (of `rows` rows) with its rows `index` replaced by those of `part`."""

    def put(parts: Sequence[Tensor]) -> Tensor:
        whole, new = _padded(parts)
        return whole.index_copy(0, index.to(whole.device), new)

    return _combine(put, [tree, part], [rows, len(index)])
