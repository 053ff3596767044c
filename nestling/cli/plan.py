"""`nestling plan`: what a run will need per GPU, and how long it will take, before anything is rented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.cli import overrides
from nestling.cli.parser import Parser, UsageError, nearest, positive
from nestling.cli.recipe import call
from nestling.cli.train import changed

if TYPE_CHECKING:
    from nestling.bench.plan import Plan
    from nestling.models import ModelConfig
    from nestling.train import RunConfig

EPILOG = """\
  nestling plan recipes/scale.py:size_760m --gpus 8 --gpu h100
  nestling plan recipes/scale.py:size_760m --gpus 8 --model.name transformer --parallel.accumulate 4
  nestling plan recipes/scale.py:size_1300m --gpus 8 --parallel.tensor 2 --model.options.hidden 5460
  nestling plan recipes/scale.py:size_160m --gpus 1 --gpu h200 --measure cuda    two short trainings here

Counted plans take a quarter of a GPU's peak for granted, and activations roughly. Measured ones are read off the steps
of two and of three blocks on the device that is named; they hold for that kind of device.
"""


def run(parser: Parser, arguments: list[str]) -> int:
    """Print the plan."""
    from nestling.bench.plan import GPUS, measure, plan
    from nestling.train import RunConfig

    rest, changes = overrides.split(arguments, RunConfig)
    parser.add_argument("recipe", help="FILE.py:FUNCTION, a function that returns a RunConfig")
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="ranks, one per GPU")
    parser.add_argument("--gpu", default="h100", help=f"kind of GPU: {', '.join(GPUS)} (default: h100)")
    parser.add_argument("--price", type=float, help="dollars per GPU and hour (default: a usual price of the kind)")
    parser.add_argument("--measure", metavar="DEVICE", help="measure on this device first, for example cuda or cpu")
    args = parser.read(rest, overrides.leaves(RunConfig))
    if args.gpu not in GPUS:
        raise UsageError(f"unknown kind {args.gpu!r} of GPU{nearest(args.gpu, GPUS)}")
    config = call(args.recipe, "recipe")
    if not isinstance(config, RunConfig):
        raise ValueError(f"recipe {args.recipe} returns {type(config).__name__}; it must return a RunConfig")
    config = changed(config, changes)
    model, gpu = model_of(config), GPUS[args.gpu]
    rows, device = config.rows_per_part(args.gpus), args.measure
    measured = measure(config, model, rows=rows, device=device) if device else None
    made = plan(config, model, args.gpus, gpu, measured)
    price = gpu.dollars if args.price is None else args.price
    print(json.dumps(as_dict(made, price)) if args.json else table(made, args.gpu, gpu.memory, price))
    return 0


def model_of(config: RunConfig) -> ModelConfig:
    """The config of the model; the vocabulary is the preset's while its tokenizer is not there yet."""
    from nestling.data import load_tokenizer
    from nestling.models import config_of, matched

    options, name = config.model.overrides(), config.data.tokenizer
    match = options.pop("match", None)
    if name == "bytes" or Path(name).is_file():
        options["vocab_size"] = load_tokenizer(name).vocab_size
    made = config_of(config.model.name, config.model.preset, **options)
    return made if match is None else matched(made, match)


def as_dict(made: Plan, price: float) -> dict[str, object]:
    """Plain values."""
    return {
        "parameters": made.parameters,
        "memory_per_gpu": {name: round(size) for name, size in made.memory.items()},
        "bytes_per_gpu": round(made.bytes),
        "tokens_per_second": made.tokens_per_second,
        "steps": made.steps,
        "days": made.days,
        "dollars": made.dollars(price),
        "measured": made.measured,
    }


def table(made: Plan, kind: str, room: float, price: float) -> str:
    """A few lines."""
    lines = [f"{made.parameters / 1e6:,.0f}M parameters on {made.gpus} x {kind}, per GPU:"]
    lines += [f"  {name:<13}{size / 2**30:8.2f} GiB" for name, size in made.memory.items()]
    fits = "fits" if made.bytes <= 0.9 * room else "does NOT fit: use more GPUs, parallel.accumulate or shorter periods"
    lines += [f"  {'together':<13}{made.bytes / 2**30:8.2f} GiB of {room / 2**30:.0f}: {fits}"]
    lines += [f"{made.tokens_per_second:,.0f} tokens/s, {made.seconds:.2f} s for each of {made.steps:,} steps"]
    lines += [f"{made.days:.2f} days, ${made.dollars(price):,.0f} at ${price:g} per GPU and hour"]
    lines += [
        "measured on this machine" if made.measured else "counted, not measured: a quarter of the peak is assumed"
    ]
    return "\n".join(lines)
