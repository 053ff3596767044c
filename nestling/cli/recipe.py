"""Functions named on the command line: `recipes/lm_small.py:hope`, `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nestling.cli.parser import nearest


def call(name: str, what: str) -> Any:
    """What the function behind FILE.py:FUNCTION or MODULE:FUNCTION returns. `what` it is for stands in messages."""
    function = load_function(name, what)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"{what} {name} cannot be called without arguments: {error}; write a function that can"
        ) from error
    return function()


def load_function(name: str, what: str) -> Callable[..., Any]:
    """The function itself.

    Runs the file, as Python would. Raises ValueError or FileNotFoundError naming the remedy.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise ValueError(f"{what} {name!r} names no function; write FILE.py:FUNCTION")
    module = load_file(place, what) if place.endswith(".py") else load_module(place, what)
    found = getattr(module, function, None)
    if not callable(found):
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ValueError(f"{what} {place} has no function {function!r}{nearest(function, own)}")
    return found


def load_file(path: str, what: str) -> ModuleType:
    """A Python file as a module; its folder may be imported from, as when Python runs it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} file {path} does not exist; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"nestling_file_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{what} file {path} is not Python: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def load_module(name: str, what: str) -> ModuleType:
    """An installed module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what} module {name!r} is not installed ({error}); write FILE.py:FUNCTION") from error
