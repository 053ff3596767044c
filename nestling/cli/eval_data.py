"""`nestling eval SUITE` for the suites that ask about texts in data files: knowledge."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nestling.cli import trained
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


SUITES: dict[str, tuple[Callable[[Parser], None], Callable[[Namespace], tuple[Sequence[Row], Report]]]] = {
    "knowledge": (knowledge_options, knowledge),
}
