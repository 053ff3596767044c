"""`nestling COMMAND ...`: finds the command, and turns whatever goes wrong for the caller into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from nestling.cli.parser import Parser, UsageError, nearest
from nestling.version import __version__

COMMANDS = {
    "demo": "train a small Hope, let it read, write a report: the whole library in minutes",
    "train": "train a model by a recipe, or go on with a run",
    "ray": "train a recipe on a Ray cluster, or a sweep of it",
    "generate": "continue a text with a trained model",
    "read": "let a trained model read a file, and keep what it learned in a memory file",
    "convert": "make levels of the MLPs of a pretrained model of transformers",
    "eval": "score a trained model: perplexity, needles, BABILong, formal languages, MAD, MQAR",
    "export": "write the model of a run as a folder of transformers",
    "prepare": "make token shards of text, JSONL, Parquet or a data set of the hub",
    "plan": "predict memory, speed, days and cost of a run on many GPUs",
    "levels": "show the boxes of a model and an optimizer: memory, objective, rule, period",
    "bench": "measure ops, layers and models on this machine, side by side with their baselines",
    "doctor": "check this installation",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error, 2 for a wrong call, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(arguments)
    except SystemExit as end:  # argparse after --help
        return int(end.code or 0)
    except UsageError as error:
        return fail(str(error), 2)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, so that the interpreter can flush at exit
            return 0
        return fail(str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def dispatch(arguments: list[str]) -> int:
    """Call the named command."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"nestling {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    command = import_module(f"nestling.cli.{name}")
    parser = Parser(prog=f"nestling {name}", description=f"{COMMANDS[name].capitalize()}.", epilog=command.EPILOG)
    return int(command.run(parser, rest))


def fail(message: str, code: int) -> int:
    """Print a message as one line."""
    print(f"nestling: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(["usage: nestling COMMAND [--help] ...", "", *lines])
