"""Arguments of a command: argparse, with errors of one line that suggest the nearest name."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class UsageError(ValueError):
    """A command was called wrongly."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[found[0]]}?" if found else f"; known are {', '.join(by_lower.values())}"


def positive(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UsageError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--json", action="store_true", help="print one JSON document instead of text")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def read(self, arguments: Sequence[str], dotted: Iterable[str] = ()) -> argparse.Namespace:
        """The namespace of all arguments; `dotted` are options read elsewhere that an unknown one may have meant.

        Raises UsageError at the first unknown argument.
        """
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            options = [option for option in self._option_string_actions if option.startswith("--")]
            if name.startswith("-"):
                leaf = name.lstrip("-").replace("-", "_")
                meant = [option for option in dotted if option.rpartition(".")[2] == leaf]
                raise UsageError(f"unknown option {name} of {self.prog}{nearest(name, meant or options)}")
            raise UsageError(f"unexpected argument {name!r}; see {self.prog} --help")
        return found
