"""`nestling levels`: the boxes of a model of ours, a trained run, or any module, with any optimizer of torch.optim."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestling.cli import overrides
from nestling.cli.parser import Parser, UsageError, nearest
from nestling.cli.recipe import call
from nestling.introspect import levels
from nestling.models import NAMES, PRESETS, build
from nestling.models.config import ModelConfig

EPILOG = """\
  nestling levels hope --model.periods 256 1024 inf --optimizer AdamW
  nestling levels runs/train-1 --figure levels.svg
  nestling levels torch.nn:Transformer --optimizer SGD --optimizer.momentum 0.9
  nestling levels mine.py:make_model --json

A model is a name (transformer, hope, hope-attention; sizes by --preset and --model.FIELD), the folder of a run, or
a function or class that makes a torch.nn.Module when it is called without arguments.
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the dotted options may set."""

    model: ModelConfig
    optimizer: dict[str, Any] = field(default_factory=dict)


def run(parser: Parser, arguments: list[str]) -> int:
    """Print, or draw, the boxes."""
    rest, changes = overrides.split(arguments, Shown)
    parser.add_argument("model", help="a model's name, a run folder, or FILE.py:FUNCTION")
    parser.add_argument("--preset", default="tiny", help=f"size of a named model: {', '.join(PRESETS)} (default: tiny)")
    parser.add_argument("--optimizer", metavar="NAME", help="a class of torch.optim, e.g. AdamW")
    parser.add_argument("--figure", metavar="FILE", help="also draw the boxes into FILE (.svg, .png, .pdf)")
    args = parser.read(rest, overrides.leaves(Shown))
    options = overrides.merged({"model": {}, "optimizer": {}}, changes)
    module = module_of(args, options["model"])
    boxes = levels(module, optimizer_of(args.optimizer, options["optimizer"], module))
    print(boxes.to_json() if args.json else boxes)
    if args.figure:
        boxes.figure(args.figure)
    return 0


def module_of(args: Namespace, sizes: dict[str, Any]) -> nn.Module:
    """The module that the first argument names."""
    name = args.model
    if name in NAMES:
        return build(name, args.preset, **sizes)
    if sizes:
        raise UsageError(
            f"--model.{next(iter(sizes))} sets a size of a named model, and {name!r} is none; leave it out"
        )
    if ":" in name:
        module = call(name, "model")
        if not isinstance(module, nn.Module):
            raise ValueError(f"model {name} returns {type(module).__name__}; it must return a torch.nn.Module")
        return module
    if Path(name).is_dir():
        from nestling.train import load_run

        return load_run(name)[0]
    raise UsageError(f"model {name!r} is no name, run folder or FILE.py:FUNCTION{nearest(name, NAMES)}")


def optimizer_of(name: str | None, options: dict[str, Any], module: nn.Module) -> torch.optim.Optimizer | None:
    """An optimizer of torch.optim on the module's parameters; Muon, which takes matrices, on those alone."""
    if name is None:
        if options:
            raise UsageError(f"--optimizer.{next(iter(options))} needs an optimizer; add --optimizer NAME")
        return None
    known = {
        k: v for k, v in vars(torch.optim).items()
        if isinstance(v, type) and issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer
    }  # fmt: skip
    if name not in known:
        raise UsageError(f"unknown optimizer {name!r}{nearest(name, known)}")
    params = [p for p in module.parameters() if name != "Muon" or p.dim() == 2]
    try:
        return known[name](params, **options)
    except TypeError as error:
        raise UsageError(f"optimizer {name} refuses its options: {error}; see torch.optim.{name}") from error
