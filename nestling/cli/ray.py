"""`nestling ray`: the run of a recipe on the workers of a Ray cluster, or a sweep of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.cli import overrides
from nestling.cli.parser import Parser, UsageError, positive
from nestling.cli.train import changed, chosen, next_folder

EPILOG = """\
  nestling ray recipes/lm_small.py:hope --workers 4 --out runs/four
  nestling ray recipes/lm_small.py:hope --out runs/sweep \\
      --sweep optim.lr=2e-3,4e-3 train.seed=0,1 model.name=hope,transformer

Options of the config as in `nestling train`. Without RAY_ADDRESS a cluster of this machine is started. A worker
that dies is started again, from the newest checkpoint. A sweep trains every combination, one process each; called
again it skips what is finished and goes on with what is not. Needs: pip install 'nestling[ray]'.
"""


def run(parser: Parser, arguments: list[str]) -> int:
    """Train; returns 0 when all steps of all runs are done."""
    from nestling.train import RunConfig

    rest, changes = overrides.split(arguments, RunConfig)
    parser.add_argument("recipe", help="FILE.py:FUNCTION, a function that returns a RunConfig")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument("--sweep", nargs="+", metavar="FIELD=A,B", help="train every combination of these values")
    parser.add_argument("--out", help="folder of the run or sweep (default: runs/NAME-N with the next free N)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="starts after a failure (default: 3)")
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    args = parser.read(rest, overrides.leaves(RunConfig))
    if args.sweep and args.workers:
        raise UsageError("--workers cannot be combined with --sweep, whose trials are one process each; leave one out")
    args.config = None
    config = changed(chosen(args), changes)
    folder = Path(args.out) if args.out else next_folder(args.recipe.rpartition(":")[2])

    from nestling.launch.ray import sweep_on_ray, train_on_ray, trials

    if args.sweep:
        found = sweep_on_ray(trials(config, grid(args.sweep)), folder, data=args.data, restarts=args.restarts)
        print(json.dumps(found) if args.json else table(found))
        return int(any(row["fault"] for row in found.values()))
    step = train_on_ray(
        config, folder, workers=args.workers or 1, data=args.data, resume=args.resume, restarts=args.restarts
    )
    finished = step == config.train.steps
    report = {"run": str(folder), "step": step, "finished": finished}
    print(json.dumps(report) if args.json else f"trained {step} steps: {folder}")
    return 0 if finished else 130


def grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """FIELD=A,B as values by field. Raises UsageError."""
    from nestling.train import RunConfig

    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, texts = word.partition("=")
        if not equals or "." not in name:
            raise UsageError(f"--sweep {word} is not FIELD=A,B; write for example optim.lr=1e-3,2e-3")
        kind = overrides.kind_of(tuple(name.split(".")), RunConfig)
        found[name] = [overrides.parse([text], kind, f"--sweep {name}") for text in texts.split(",")]
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as markdown."""
    heads = ("step", "loss", "held-out loss", "seconds", "skipped", "fault")
    lines = ["| trial | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{v:.4f}" if isinstance(v := row[head], float) else str(v) for head in heads]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
