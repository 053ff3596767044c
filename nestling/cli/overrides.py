"""Dotted overrides of nested dataclasses, typed by their fields: `--train.steps 100 --model.periods 256 1024 inf`.

A value follows after a blank or "=". Tuples take several values, or one with commas; a bool alone is true; None is
written none. Hyphens in names count as underscores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from nestling.cli.parser import UsageError, nearest


@dataclass(frozen=True)
class Override:
    """One override: the path of a leaf, and its value."""

    path: tuple[str, ...]
    value: Any


def split(arguments: Sequence[str], root: type) -> tuple[list[str], list[Override]]:
    """Take the dotted options of dataclass `root` out of a command line; the other arguments come back in order.

    Raises UsageError for an unknown name (with the nearest one) or a value of another type.
    """
    rest: list[str] = []
    found: list[Override] = []
    todo = list(arguments)
    while todo:
        word = todo.pop(0)
        name, equals, attached = word.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(word)
            continue
        path = tuple(name[2:].replace("-", "_").split("."))
        kind = kind_of(path, root)
        texts = [attached] if equals else take(todo, kind)
        found.append(Override(path, parse(texts, kind, name)))
    return rest, found


def take(todo: list[str], kind: Any) -> list[str]:
    """Remove the values of one option from the front of `todo`."""
    if kind is bool and not (todo and todo[0].lower() in ("true", "false")):
        return ["true"]
    most = len(todo) if is_tuple(kind) else 1
    texts: list[str] = []
    while todo and len(texts) < most and not todo[0].startswith("--"):
        texts.append(todo.pop(0))
    return texts


def kind_of(path: tuple[str, ...], root: type) -> Any:
    """The annotated type of a leaf. Raises UsageError with the nearest leaf."""
    kind: Any = root
    for i, name in enumerate(path):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
        if name not in hints:
            return unknown(path, i, root)
        kind = hints[name]
    if is_dataclass(kind) or get_origin(kind) is dict:
        raise UsageError(f"--{'.'.join(path)} is a group; name one of {', '.join(leaves(kind, '.'.join(path)))}")
    return kind


def unknown(path: tuple[str, ...], at: int, root: type) -> Any:
    """Raise UsageError for a path that ends nowhere."""
    known = leaves(root)
    same_name = [leaf for leaf in known if leaf.rpartition(".")[2] == path[-1]]
    option = f"--{'.'.join(path)}"
    raise UsageError(f"unknown option {option}{nearest(option, same_name or known)}")


def leaves(kind: Any, path: str = "") -> list[str]:
    """Every leaf below a dataclass as an option."""
    if get_origin(kind) is dict:
        return [f"--{path}.NAME"]
    if not is_dataclass(kind):
        return [f"--{path}"]
    hints = get_type_hints(kind)
    return [leaf for f in fields(kind) for leaf in leaves(hints[f.name], f"{path}.{f.name}".lstrip("."))]


def parts_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_free(kind: Any) -> bool:
    """Whether a value may be of several types that text does not tell apart; it is read as Python would."""
    return kind is Any or (str in parts_of(kind) and len(parts_of(kind)) > 2)


def is_tuple(kind: Any) -> bool:
    """Whether several words may follow."""
    return not is_free(kind) and any(get_origin(part) is tuple for part in parts_of(kind))


def parse(texts: list[str], kind: Any, option: str) -> Any:
    """The value that `texts` stand for. Raises UsageError naming option, value and type."""
    if not texts or texts == [""]:
        if kind is str and texts:
            return ""
        raise UsageError(f"{option} needs a value of type {name_of(kind)}")
    for part in (Any,) if is_free(kind) else parts_of(kind):
        try:
            return one(texts, part)
        except ValueError:
            continue
    raise UsageError(f"{option}={' '.join(texts)} is not of type {name_of(kind)}; give a value of that type")


def one(texts: list[str], kind: Any) -> Any:
    """Texts as one plain type. Raises ValueError."""
    if get_origin(kind) is tuple:
        words = [word for text in texts for word in text.split(",") if word]
        return tuple(one([word], get_args(kind)[0]) for word in words)
    if len(texts) != 1:
        raise ValueError("several values")
    text = texts[0].strip()
    if kind is NoneType and text.lower() == "none":
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        return kind(text.replace("_", ""))
    if kind is str:
        return texts[0]
    if kind is Any:
        return literal(text)
    raise ValueError(f"not a {kind}")


def literal(text: str) -> Any:
    """A number, True, False, None, or a tuple of these by commas; anything else is the text itself."""
    if "," in text:
        return tuple(literal(word) for word in text.split(",") if word)
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def name_of(kind: Any) -> str:
    """A type in words."""
    if len(parts_of(kind)) > 1:
        return " or ".join(name_of(part) for part in parts_of(kind))
    if get_origin(kind) is tuple:
        return f"{name_of(get_args(kind)[0])} ..."
    return "none" if kind is NoneType else getattr(kind, "__name__", str(kind))


def merged(values: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Nested plain values with the overrides in their places; `values` stays as it is."""
    made = dict(values)
    for override in overrides:
        first, *rest = override.path
        below = made.get(first) or {}
        made[first] = merged(below, [Override(tuple(rest), override.value)]) if rest else override.value
    return made
