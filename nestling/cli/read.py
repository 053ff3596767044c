"""`nestling read`: a trained model reads a text, learns while it reads, and keeps what it learned in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.cli import trained
from nestling.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from nestling.evals import ReadResult

EPILOG = """\
  nestling read book.txt --model runs/train-1 --state memory.safetensors
  nestling read next.txt --model runs/train-1 --state memory.safetensors     goes on with that memory
  nestling read book.txt --model runs/train-1 --compare                      against the same model frozen
  nestling read book.txt --model runs/train-1 --period 256 --erase 0.5 --rate 0.056     learns more, by the delta rule

Every byte is predicted before the model learns from it. With --frozen nothing is learned and no file written.
"""
PARTS = 4


def run(parser: Parser, arguments: list[str]) -> int:
    """Read, print the loss by quarters of the text, write the memory."""
    trained.add_text(parser)
    trained.add_model(parser)
    parser.add_argument(
        "--state", metavar="FILE", help="the memory file: where to go on from if it exists, and to keep"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--learn", action="store_true", help="let the levels learn while reading (the default)")
    how.add_argument("--frozen", action="store_true", help="read without learning; --state is only read")
    how.add_argument("--compare", action="store_true", help="read twice, learning and frozen, and print the gain")
    trained.add_writes(parser)
    args = parser.read(arguments)
    if args.state and not Path(args.state).resolve().parent.is_dir():
        raise UsageError(f"--state={args.state} lies in a folder that does not exist; make it first")

    from nestling.evals import gain_percent, read_text
    from nestling.models import save_state

    text = trained.text_of(args.file, args.data)
    model, tokenizer = trained.load_model(args.model, args.device)
    model = trained.written(model, args)
    before = trained.load_memory(args.state, args.device) if args.state and Path(args.state).exists() else None
    tokens = trained.tokens_of(text, tokenizer, args.device)
    read = read_text(model, tokens, learn=not args.frozen, state=before)
    report = summary(read, len(text.encode()) / tokens.shape[1]) | {"file": args.file, "learn": read.learn}
    if args.compare:
        frozen = read_text(model, tokens, learn=False, state=before)
        report |= {"frozen": summary(frozen, len(text.encode()) / tokens.shape[1]), "gain": gain_percent(read, frozen)}
    if args.state and read.learn:
        save_state(read.state, args.state)
        report |= {"state": args.state, "state_bytes": Path(args.state).stat().st_size}
    print(json.dumps(report, indent=2) if args.json else page(report))
    return 0


def summary(read: ReadResult, bytes_per_token: float) -> dict[str, Any]:
    """The numbers of one reading."""
    from nestling.evals import bits_per_byte

    quarters = [read.nats(i / PARTS, (i + 1) / PARTS) for i in range(PARTS)]
    return {
        "tokens": read.losses.shape[1] + 1,
        "bits_per_byte": bits_per_byte(read.nats(), bytes_per_token),
        "by_quarter": [bits_per_byte(nats, bytes_per_token) for nats in quarters],
        "writes": list(read.writes[-1].counts) if read.writes else [],
    }


def page(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['tokens']:,} tokens of {report['file']}; bits per byte by quarter of the text"]
    name = "learning" if report["learn"] else "frozen"
    lines.append(row(name, report))
    if "frozen" in report:
        lines.append(row("frozen", report["frozen"]))
        lines.append(f"gain by learning on the second half: {report['gain']:.1f} %")
    if report["learn"]:
        counts = ", ".join(f"{count:,.0f}" for count in report["writes"])
        lines.append(f"writes by level, fast to slow, so far: {counts or 'this model has no level that writes'}")
    if "state" in report:
        lines.append(f"memory kept in {report['state']}, {report['state_bytes']:,} bytes")
    return "\n".join(lines)


def row(name: str, numbers: dict[str, Any]) -> str:
    """One line of the table."""
    quarters = "  ".join(f"{bits:.3f}" for bits in numbers["by_quarter"])
    return f"  {name:<9} {quarters}   all {numbers['bits_per_byte']:.3f}"
