"""`nestling convert`: the MLPs of a pretrained model become levels that learn while it reads."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from nestling.cli import trained
from nestling.cli.parser import Parser, UsageError

EPILOG = """\
  nestling convert Qwen/Qwen3-0.6B --periods 512 2048 --out runs/qwen
  nestling convert stories260K.bin --tokenizer tok512.bin --old stories.txt --out runs/stories
  nestling read book.txt --model runs/stories --state memory.safetensors --compare

The model computes what it did before until it reads with learning on. Writes spare what it knows: as --old shows it,
text like what it was trained on, or as it shows itself, by sampling. Needs: pip install 'nestling[hf]'.
"""
PERIODS = [256, 512, 1024]
WINDOW, WINDOWS = 256, 64  # tokens of one piece of old text, and pieces


def period(text: str) -> float:
    """An argument type: a whole number of tokens, or inf."""
    if text == "inf":
        return math.inf
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of at least 1 nor inf")
    return int(text)


def run(parser: Parser, arguments: list[str]) -> int:
    """Load, convert, calibrate, save; print the levels."""
    parser.add_argument("model", help="a folder of transformers, a name on the hub, or a checkpoint of llama2.c")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the converted model goes; a new folder")
    parser.add_argument("--periods", nargs="+", type=period, default=PERIODS, metavar="N",
                        help="tokens between two writes, fast to slow (default: 256 512 1024)")  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, metavar="R", help="one, or one per period")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of context at most")
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help="ends of the paths of the MLPs")
    parser.add_argument("--tokenizer", metavar="NAME", help="its tokenizer, if that lies elsewhere")
    parser.add_argument("--old", metavar="FILE", help="text like what the model was trained on (a file or a folder)")
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    args = parser.read(arguments)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise UsageError(f"--out={args.out} is not empty; give a new folder")

    from nestling.hf import convert_to_cms
    from nestling.hf.files import load_plain, save

    plain, tokenizer = load_plain(args.model, args.tokenizer)
    old = None
    if args.old:
        ids = trained.tokens_of(trained.text_of(args.old, args.data), tokenizer, "cpu")[0]
        old = pieces_of(ids, min(WINDOW, args.context or WINDOW), args.old)
    rates = args.rates[0] if args.rates and len(args.rates) == 1 else args.rates
    model = convert_to_cms(
        plain.eval(), args.periods, rates=rates, target_modules=args.target_modules, context=args.context, old_text=old
    )
    save(model, tokenizer, args.out, args.tokenizer if Path(args.model).is_file() else None)
    report(args, model)
    return 0


def pieces_of(ids: Tensor, length: int, name: str) -> Tensor:
    """Pieces (n, length) from all over a text. Raises ValueError if there is not one whole piece."""
    if len(ids) < length:
        raise ValueError(f"--old={name} has {len(ids)} tokens; give at least {length}")
    starts = torch.linspace(0, len(ids) - length, min(WINDOWS, len(ids) // length)).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def report(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """What was made."""
    from nestling.introspect import levels

    boxes = levels(model)
    if args.json:
        print(json.dumps({"out": args.out, "old": args.old, "levels": boxes.as_dicts()}, indent=2))
        return
    print(boxes.table())
    known = args.old or "text that it sampled itself"
    print(f"\n{args.model} is converted; its writes spare what it needs for {known}. It is in {args.out}")
