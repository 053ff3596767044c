"""`nestling export`: the model of a run as a folder of transformers, however many ranks wrote its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from nestling.cli.parser import Parser, UsageError

EPILOG = """\
  nestling export runs/hope-760m --out models/hope-760m
  nestling read book.txt --model models/hope-760m --state memory.safetensors

The newest whole checkpoint is taken: config.json, model.safetensors, tokenizer and a card. The folder loads with
AutoModelForCausalLM after `import nestling.hf`. Needs: pip install 'nestling[hf]'.
"""


def run(parser: Parser, arguments: list[str]) -> int:
    """Load, write, say where."""
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model goes; a new folder")
    args = parser.read(arguments)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise UsageError(f"--out={args.out} is not empty; give a new folder")

    from nestling.hf.files import save_trained
    from nestling.train import load_run

    model, tokenizer = load_run(args.run)
    save_trained(model, getattr(tokenizer, "inner", None), args.out)
    report = {"out": args.out, "parameters": model.num_parameters()}
    print(json.dumps(report) if args.json else f"{report['parameters']:,} parameters in {args.out}")
    return 0
