"""RunConfig as JSON: strict reading, and the difference of two configs."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from nestling.train.config import RunConfig

T = TypeVar("T")


def config_to_json(config: RunConfig) -> str:
    """Standard JSON; infinity is the string "inf"."""
    return json.dumps(_plain(config.to_dict()), indent=2, allow_nan=False)


def config_from_json(text: str) -> RunConfig:
    """The config that `config_to_json` wrote. Raises ValueError for an unknown key or a value of another type."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a config: {error}; write it again with config_to_json") from error
    return from_dict(RunConfig, values)


def read_config(path: str | Path) -> RunConfig:
    """The config of a file. Raises FileNotFoundError, or ValueError with the path."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}; give the path of a run.json")
    try:
        return config_from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_dict(cls: type[T], values: Any, path: str = "") -> T:
    """An instance of a config dataclass from plain values; `path` is where they stand, for messages."""
    if not isinstance(values, dict):
        raise ValueError(f"{path or cls.__name__} is {values!r}, not a mapping of names to values; see --help")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key {_join(path, name)!r}{nearest(name, known, path)}")
    return cls(**{name: coerce(value, hints[name], _join(path, name)) for name, value in values.items()})


def coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as the annotated type `kind`; a list becomes a tuple, an int a float, "inf" infinity."""
    if is_dataclass(kind):
        return from_dict(kind, value, path)  # type: ignore[arg-type]
    if get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            try:
                return coerce(value, part, path)
            except ValueError:
                continue
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(coerce(v, get_args(kind)[0], path) for v in value)
    elif get_origin(kind) is dict and isinstance(value, dict):
        return {str(k): coerce(v, get_args(kind)[1], f"{path}.{k}") for k, v in value.items()}
    elif kind is NoneType and value is None:
        return None
    elif kind is float and (
        value in ("inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool))
    ):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{path}={value!r} is not {getattr(kind, '__name__', kind)}; see --help for its type")


def nearest(name: str, known: list[str], path: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, or all."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {_join(path, found[0])!r}?" if found else f"; known are {', '.join(known)}"


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Lines "train.steps: 300 -> 400" for each leaf that differs."""
    lines: list[str] = []
    for name in sorted({*old, *new}):
        a, b, where = old.get(name), new.get(name), _join(path, name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, where)
        elif _plain(a) != _plain(b):
            lines.append(f"{where}: {a!r} -> {b!r}")
    return lines


def _plain(value: Any) -> Any:
    """Values of standard JSON."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
