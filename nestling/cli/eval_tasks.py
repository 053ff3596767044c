"""`nestling eval SUITE` for the suites that make their examples by seed, see SUITES."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from typing import TYPE_CHECKING

from nestling.cli import trained
from nestling.cli.parser import Parser, UsageError, nearest, positive

if TYPE_CHECKING:
    from nestling.data import Tokenizer
    from nestling.evals import Score, Task

SUITES = ("formal-languages", "mad", "mqar", "needles", "babilong")
IN_A_TEXT = ("needles", "babilong")  # suites that hide things in one
BABI = "longctx/babi.tar.xz"  # below the folder of data
Lengths = tuple[int, int]


def run(parser: Parser, arguments: list[str]) -> int:
    """Ask, and print the scores."""
    parser.add_argument("suite", help=f"one of {', '.join(SUITES)}")
    if arguments[0] in IN_A_TEXT:
        trained.add_text(parser)
    trained.add_model(parser)
    parser.add_argument("--tasks", nargs="+", metavar="NAME", default=[], help="some of the suite's tasks")
    parser.add_argument(
        "--lengths", nargs="+", type=span, metavar="LOW-HIGH", default=[], help="tokens (default: the suite's own)"
    )
    parser.add_argument("--examples", type=positive, default=64, help="of each task and length (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the examples (default: 0)")
    parser.add_argument("--learn", action="store_true", help="let the levels learn inside each example")
    args = parser.read(arguments)
    if args.suite != "babilong" and any(low < 1 for low, _ in args.lengths):
        raise UsageError(f"--lengths from 0 is a length of babilong; {args.suite} needs 1 or more")
    scores = asked(args)
    if args.json:
        print(json.dumps({"suite": args.suite, "scores": [score.to_dict() for score in scores]}, indent=2))
    else:
        from nestling.evals import table

        print(table(scores))
    return 0


def span(text: str) -> Lengths:
    """An argument type: 512, or 41-160."""
    low, _, high = text.partition("-")
    if not low.isdigit() or not (high or low).isdigit() or not int(low) <= int(high or low):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, nor two from low to high, as in 41-160")
    return int(low), int(high or low)


def asked(args: Namespace) -> list[Score]:
    """One score per task and length."""
    from nestling.evals import BABILongTask, NeedleTask, babilong_score, needle_score, score

    model, tokenizer = trained.load_model(args.model, args.device)
    known = settings(args, tokenizer)
    for name in args.tasks:
        if name not in known:
            raise UsageError(f"unknown task {name!r} of {args.suite}{nearest(name, known)}")
    scores: list[Score] = []
    for name in args.tasks or known:
        task, usual = known[name]
        if task.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{name} has {task.vocab_size} symbols and {args.model} reads {model.config.vocab_size}; "
                "use a model with a vocabulary at least as large"
            )
        for lengths in args.lengths or usual:
            about = {"seed": args.seed, "learn": args.learn, "device": args.device}
            if isinstance(task, NeedleTask):
                scores.append(needle_score(model, task, args.examples, lengths, **about))
            elif isinstance(task, BABILongTask):
                scores.append(babilong_score(model, task, args.examples, lengths, **about))
            else:
                scores.append(score(model, task, args.examples, lengths, **about))
    return scores


def settings(args: Namespace, tokenizer: Tokenizer) -> dict[str, tuple[Task, list[Lengths]]]:
    """The tasks of a suite by name, each with its usual lengths."""
    from nestling.data.text import locate
    from nestling.evals import BABILONG, LANGUAGES, MAD, NEEDLES, BABILongTask, NeedleTask, read_stories
    from nestling.evals.mqar import BASED_TEST

    if args.suite == "formal-languages":
        return {name: (language, [(1, 40), (41, 160)]) for name, language in LANGUAGES.items()}
    if args.suite == "mad":
        return {name: (task, [(task.length, task.length)]) for name, task in MAD.items()}
    if args.suite == "mqar":
        return {task.name: (task, [(length, length)]) for task, length, _ in BASED_TEST}
    text = trained.text_of(args.file, args.data)
    if args.suite == "needles":
        return {name: (NeedleTask(needle, tokenizer, text), [(1000, 1024)]) for name, needle in NEEDLES.items()}
    stories = {name: read_stories(locate(BABI, args.data), name, "test") for name in BABILONG}
    return {name: (BABILongTask(name, found, tokenizer, text), [(0, 0)]) for name, found in stories.items()}
