"""`nestling train`: a recipe with overrides, or the rest of a run that was stopped."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.cli import overrides
from nestling.cli.parser import Parser, UsageError
from nestling.cli.recipe import call

if TYPE_CHECKING:
    from nestling.train import RunConfig

EPILOG = """\
A recipe is a Python function that returns a nestling.train.RunConfig. Any field of it can be overridden:

  nestling train recipes/lm_small.py:hope --train.steps 100 --model.periods 256 1024 inf
  nestling train --data.text book.txt --model.name transformer      without a recipe: the defaults
  nestling train --resume runs/hope-1                               go on where a run was stopped

  torchrun --nproc-per-node 2 --max-restarts 3 -m nestling train recipes/lm_small.py:hope --out runs/two
                                                                    on several processes; restarts by itself

--show prints the resolved config, every field with its value, and trains nothing.
"""


def run(parser: Parser, arguments: list[str]) -> int:
    """Train; returns 0 when all steps are done, 130 when a signal stopped the run."""
    from nestling import train
    from nestling.train import RunConfig, config_to_json
    from nestling.train.parallel.ranks import restarted
    from nestling.train.run import run_config

    rest, changes = overrides.split(arguments, RunConfig)
    parser.add_argument("recipe", nargs="?", help="FILE.py:FUNCTION, a function that returns a RunConfig")
    parser.add_argument("--config", help="a run.json, or a config written by --show --json, instead of a recipe")
    parser.add_argument("--out", help="folder of the run (default: runs/NAME-N with the next free N)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder")
    parser.add_argument("--checkpoint", type=Path, help="go on from this checkpoint instead of the newest")
    parser.add_argument("--trust", action="store_true", help="allow a checkpoint from outside the run folder")
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    parser.add_argument("--show", action="store_true", help="print the resolved config and stop")
    args = parser.read(rest, overrides.leaves(RunConfig))
    check(args)
    if args.resume:
        config, folder = run_config(args.resume), Path(args.resume)
    else:
        config, folder = chosen(args), Path(args.out) if args.out else next_folder(name_of(args))
    config = changed(config, changes)
    if args.show:
        print(config_to_json(config) if args.json else listing(config))
        return 0
    resume = bool(args.resume) or restarted()
    _, result = train.run(config, folder, data=args.data, resume=resume, checkpoint=args.checkpoint, trust=args.trust)
    if not is_first():
        return 0 if result.finished else 130
    report = {"run": str(folder), "step": result.step, "finished": result.finished, "stopped_by": result.stopped_by}
    print(json.dumps(report) if args.json else f"trained {result.step} steps: {folder}")
    return 0 if result.finished else 130


def check(args: Namespace) -> None:
    """Raise UsageError for arguments that contradict each other."""
    given = [name for name in ("recipe", "config", "resume") if getattr(args, name)]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be combined; give one of them")
    if args.checkpoint and not args.resume:
        raise UsageError(f"--checkpoint={args.checkpoint} needs the run it belongs to; add --resume RUN")
    if args.resume and args.out:
        raise UsageError("--out cannot be combined with --resume, which goes on in its own folder; leave one out")
    if "TORCHELASTIC_RUN_ID" in os.environ and not (args.out or args.resume or args.show):
        raise UsageError("several processes need one folder, also after a restart; name it with --out DIR")


def is_first() -> bool:
    """Whether this process is the only one, or the one of several that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def chosen(args: Namespace) -> RunConfig:
    """The config of the recipe or file, or the defaults."""
    from nestling.train import RunConfig, read_config
    from nestling.train.run import run_config

    if args.config:
        path = Path(args.config)
        return run_config(path.parent) if path.name == "run.json" else read_config(path)
    if not args.recipe:
        return RunConfig()
    config = call(args.recipe, "recipe")
    if not isinstance(config, RunConfig):
        raise ValueError(f"recipe {args.recipe} returns {type(config).__name__}; it must return a RunConfig")
    return config


def changed(config: RunConfig, changes: list[overrides.Override]) -> RunConfig:
    """The config with overrides, checked as a whole."""
    from nestling.train import RunConfig, from_dict

    return from_dict(RunConfig, overrides.merged(config.to_dict(), changes)) if changes else config


def name_of(args: Namespace) -> str:
    """What a run is called: the recipe's function."""
    return args.recipe.rpartition(":")[2] if args.recipe else "train"


def next_folder(name: str) -> Path:
    """runs/NAME-N with the first N that is free."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def listing(config: RunConfig) -> str:
    """Every field as the option that would set it."""
    lines = []

    def walk(values: dict[str, object], path: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{path}{name}.")
            elif not isinstance(value, dict):
                text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                lines.append(f"--{path}{name} {text or repr('')}")

    walk(config.to_dict(), "")
    return "\n".join(lines)
