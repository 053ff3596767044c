"""`nestling eval SUITE` for common-sense, in-context-recall, knowledge: suites that ask about texts in data files."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nestling.cli import eval_tasks, trained
from nestling.cli.parser import Parser, positive

if TYPE_CHECKING:
    from nestling.evals.suite import Row

Report = dict[str, Any]


def run(parser: Parser, arguments: list[str]) -> int:
    """Ask, and print the scores."""
    parser.add_argument("suite", help=f"one of {', '.join(SUITES)}")
    trained.add_model(parser)
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    add_options, score = SUITES[arguments[0]]
    add_options(parser)
    args = parser.read(arguments)
    rows, report = score(args)
    if args.json:
        print(json.dumps({"suite": args.suite} | report, indent=2))
    else:
        from nestling.evals import table

        print("\n".join([table(rows), *report.get("notes", [])]))
    return 0


def recall_options(parser: Parser) -> None:
    """Which documents `in-context-recall` shows, and how many."""
    parser.add_argument("--tasks", nargs="+", choices=("records", "cloze"), default=["records", "cloze"])
    parser.add_argument("--lengths", type=eval_tasks.span, default=(128, 256), metavar="LOW-HIGH", help="in tokens")
    parser.add_argument("--examples", type=positive, default=64, help="of each task (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the examples (default: 0)")
    parser.add_argument("--learn", action="store_true", help="let the levels learn inside each example")


def recall(args: Namespace) -> tuple[Sequence[Row], Report]:
    """Documents of which parts must be said again, with the document and without; of the titles kept for tests."""
    from nestling.data import locate, read_passages
    from nestling.data.questions import SQUAD
    from nestling.evals import needle_score
    from nestling.evals.in_context_recall import DBPEDIA, cloze, part, read_entries, records

    model, tokenizer = trained.load_model(args.model, args.device)
    made = {
        "records": lambda: records(part(read_entries(locate(DBPEDIA, args.data)), "test"), tokenizer),
        "cloze": lambda: cloze(part(read_passages(locate(SQUAD, args.data)), "test"), tokenizer),
    }
    about = {"seed": args.seed, "learn": args.learn, "device": args.device}
    scores = [
        needle_score(model, asked, args.examples, args.lengths, **about)
        for task in (made[name]() for name in args.tasks)
        for asked in (task, task.without_document())
    ]
    return scores, {"scores": [score.to_dict() for score in scores]}


def knowledge_options(parser: Parser) -> None:
    """What `knowledge` asks, and how the model writes while it reads."""
    parser.add_argument("--passages", type=positive, default=39, help="passages, each of another article (default: 39)")
    parser.add_argument(
        "--times", type=positive, nargs="+", default=[1, 4], help="how often a passage is read (default: 1 4)"
    )
    trained.add_writes(parser)


def knowledge(args: Namespace) -> tuple[Sequence[Row], Report]:
    """Questions about passages that were read, in another context."""
    from nestling.data import locate, one_per_article, read_passages
    from nestling.data.questions import SQUAD
    from nestling.evals import facts, knowledge, less_bits

    chosen = one_per_article(read_passages(locate(SQUAD, args.data)), shortest=512, longest=768)[: args.passages]
    model, tokenizer = trained.load_model(args.model, args.device)
    times = sorted(set(args.times))
    made = knowledge(trained.written(model, args), tokenizer, chosen, times=times)
    found = {
        n: {
            "than before": less_bits(made, "nothing", "own", n),
            "than after another passage": less_bits(made, "another", "own", n),
            "than swapped answers, beyond before": facts(made, n),
        }
        for n in times
    }
    notes = [f"read {n}x, bits less {words}: {value}" for n, lines in found.items() for words, value in lines.items()]
    plain = {n: {words: vars(value) for words, value in lines.items()} for n, lines in found.items()}
    return made, {"conditions": [c.to_dict() for c in made], "bits less": plain, "notes": notes}


def common_sense_options(parser: Parser) -> None:
    """Which tasks `common-sense` asks, and how."""
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="some of the tasks, or official ones of lm-eval by name"
    )
    parser.add_argument("--limit", type=positive, help="the first so many items of each task (default: all)")
    parser.add_argument(
        "--max-length", type=positive, help="tokens of a request that are read, the last (default: all)"
    )
    parser.add_argument("--learn", action="store_true", help="let the levels learn inside each request")


def common_sense(args: Namespace) -> tuple[Sequence[Row], Report]:
    """Multiple choice and LAMBADA, zero-shot, through lm-eval."""
    from nestling.evals import as_lm, common_sense
    from nestling.evals.common_sense import TASKS
    from nestling.evals.lm_harness import library

    library()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = trained.load_model(args.model, args.device)
    lm = as_lm(model, tokenizer, learn=args.learn, max_length=args.max_length)
    made = common_sense(lm, args.tasks or TASKS, data=args.data, limit=args.limit)
    return made, {"scores": [one.to_dict() for one in made]}


SUITES: dict[str, tuple[Callable[[Parser], None], Callable[[Namespace], tuple[Sequence[Row], Report]]]] = {
    "common-sense": (common_sense_options, common_sense),
    "in-context-recall": (recall_options, recall),
    "knowledge": (knowledge_options, knowledge),
}
