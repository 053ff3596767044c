"""The command line that recipes share: measure what is missing, show the newest result as a page, redraw its figure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from recipes.cells import Cell

RESULTS, FIGURES = Path("results"), Path("docs/figures")


def newest(recipe: str) -> Cell:
    """The newest committed result of a recipe."""
    return json.loads(max((RESULTS / recipe).glob("*.json")).read_text(encoding="utf-8"))


def parser_of(recipe: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every recipe takes: --table, and --figure."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest committed result, run nothing")
    parser.add_argument("--figure", action="store_true", help=f"draw {FIGURES / recipe}.png from it")
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data, of recipes that read data sets from a folder."""
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")


def run(
    recipe: str,
    options: argparse.Namespace,
    measure: Callable[[], object],
    page: Callable[[Cell], str],
    draw: Callable[[Cell, Path], None],
) -> None:
    """What the options ask for, on one thread: `measure` writes a result, `page` and `draw` show the newest."""
    torch.set_num_threads(1)
    if not (options.table or options.figure):
        print(measure())
    result = newest(recipe)
    if options.figure:
        draw(result, FIGURES / f"{recipe}.png")
    print(page(result))


def shown(found: Cell, form: str) -> str:
    """An interval as a table has it: mean [low, high], or the mean alone where one seed gives no interval."""
    if found["low"] is None:
        return f"{found['mean']:{form}}"
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
