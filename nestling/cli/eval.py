"""`nestling eval SUITE`: score a trained model. Here perplexity.

The suites that make their examples: eval_tasks.py; those that ask what data files say: eval_data.py.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from nestling.cli import eval_data, eval_tasks, trained
from nestling.cli.parser import Parser, UsageError, nearest, positive

if TYPE_CHECKING:
    from torch import Tensor

    from nestling.models import ReadingModel

EPILOG = """\
  nestling eval perplexity emma --model runs/train-1
  nestling eval perplexity emma --model runs/train-1 --length 1024 --contexts 64 256 896
  nestling eval perplexity shakespeare --model runs/train-1 --state memory.safetensors
  nestling eval needles emma --model runs/train-1 --tasks s-niah-2 multi-key --lengths 1000-1024 4000-4096
  nestling eval babilong emma --model runs/train-1 --data DIR --tasks qa1 --lengths 0 4096
  nestling eval formal-languages --model runs/mine --lengths 1-40 41-160
  nestling eval common-sense --model runs/train-1 --data DIR --tasks nestling_piqa nestling_lambada --limit 100
  nestling eval in-context-recall --model runs/train-1 --data DIR --tasks records --lengths 128-256
  nestling eval knowledge --model runs/train-1 --data DIR --period 256 --erase 0.5 --rate 0.056

perplexity: the text is cut into windows, each read from a fresh state. With --state, the windows are scored without and
with what the memory file has learned (its context cleared): what reading has cost, or brought, on this text.
The other suites: `nestling eval SUITE --help` has their options.
"""
SUITES = ("perplexity", *eval_tasks.SUITES, *eval_data.SUITES)


def run(parser: Parser, arguments: list[str]) -> int:
    """Score, and print the numbers."""
    if arguments and arguments[0] in eval_tasks.SUITES:
        return eval_tasks.run(parser, arguments)
    if arguments and arguments[0] in eval_data.SUITES:
        return eval_data.run(parser, arguments)
    parser.add_argument("suite", help=f"one of {', '.join(SUITES)}")
    trained.add_text(parser)
    trained.add_model(parser)
    parser.add_argument("--length", type=positive, default=256, help="tokens per window (default: 256)")
    parser.add_argument("--windows", type=positive, default=64, help="windows, spread over the text (default: 64)")
    parser.add_argument(
        "--contexts", type=positive, nargs="+", default=[], help="also by these numbers of context tokens"
    )
    parser.add_argument("--learn", action="store_true", help="let the levels learn inside each window")
    parser.add_argument("--state", metavar="FILE", help="also score with what this memory file has learned")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in SUITES:
        raise UsageError(f"unknown suite {arguments[0]!r}{nearest(arguments[0], SUITES)}")
    args = parser.read(arguments)
    if args.state and (args.learn or args.contexts):
        raise UsageError("--state scores the frozen model on whole windows; leave out --learn and --contexts")
    model, windows, bytes_per_token = prepared(args)
    report = with_memory(args, model, windows) if args.state else by_position(args, model, windows, bytes_per_token)
    report = {"file": args.file, "windows": len(windows), "length": windows.shape[1] - 1} | report
    print(json.dumps(report, indent=2) if args.json else page(report))
    return 0


def prepared(args: Namespace) -> tuple[ReadingModel, Tensor, float]:
    """The model, windows (n, T + 1) of the text, and bytes per token."""
    from nestling.data import held_out_windows, load_documents, tokenize

    documents = load_documents(args.file, args.data)
    model, tokenizer = trained.load_model(args.model, args.device)
    tokens = tokenize(documents, tokenizer)
    windows = held_out_windows(tokens, length=args.length, count=args.windows).to(args.device)
    return model, windows, sum(len(text.encode()) for text in documents) / len(tokens)


def by_position(args: Namespace, model: ReadingModel, windows: Tensor, bytes_per_token: float) -> dict[str, Any]:
    """Loss by position in the window, and by context."""
    from nestling.evals import perplexity

    result = perplexity(
        model, windows, learn=args.learn, contexts=args.contexts, buckets=8, bytes_per_token=bytes_per_token
    )
    return result.to_dict()


def with_memory(args: Namespace, model: ReadingModel, windows: Tensor) -> dict[str, Any]:
    """Loss without and with what a memory file has learned."""
    from nestling.evals import forgetting

    memory = trained.load_memory(args.state, args.device)
    change = forgetting(model, memory, windows)
    return {"state": args.state, "nats": change.before, "nats_with_state": change.after, "percent": change.percent}


def page(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['windows']} windows of {report['length']} tokens of {report['file']}"]
    if "state" in report:
        lines.append(f"  nats per token {report['nats']:.4f}, with {report['state']} {report['nats_with_state']:.4f}")
        return "\n".join([*lines, f"  change {report['percent']:+.2f} %"])
    total = report["total"]
    lines.append(
        f"  perplexity {report['perplexity']:.3f}  nats per token {total['nats']:.4f}  "
        f"bits per byte {total['bits_per_byte']:.4f}"
    )
    lines += [f"  positions {p['start'] + 1:>6,} to {p['end']:>6,}: {p['nats']:.4f}" for p in report["by_position"]]
    lines += [f"  after {c['context']:>6,} tokens: {c['nats']:.4f}" for c in report["by_context"]]
    return "\n".join(lines)
