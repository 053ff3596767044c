"""`nestling prepare`: any source of documents becomes a folder of token shards that runs of any size read."""

from __future__ import annotations

import json
import sys
import time

from nestling.cli.parser import Parser, positive

EPILOG = """\
  nestling prepare corpus/ --out shards/corpus --tokenizer tokenizer.json --workers 8
  nestling prepare hub:HuggingFaceFW/fineweb-edu:sample-10BT --out shards/web --tokenizer tokenizer.json --workers 16
  nestling train --data.text shards/corpus --data.validation shards/held-out

A folder gives its .txt, .txt.xz, .jsonl and .parquet files. What was stopped goes on when it is called again, and the
shards are the same whatever the number of workers. Parquet and the hub need: pip install 'nestling[data]'.
"""


def run(parser: Parser, arguments: list[str]) -> int:
    """Encode, with a line of progress on stderr; print what was made."""
    parser.add_argument("source", help="a file, a folder, or hub:NAME[:CONFIG] for a data set of the hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME", help="'bytes' (default) or a tokenizer.json")
    parser.add_argument("--field", default="text", help="where the text of a record is (default: text)")
    parser.add_argument("--workers", type=positive, default=1, help="processes (default: 1)")
    parser.add_argument("--shard-tokens", type=positive, default=100_000_000, help="tokens of a shard at most")
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")
    args = parser.read(arguments)

    from nestling.data import locate, prepare_shards
    from nestling.data.sources import HUB

    source = args.source if args.source.startswith(HUB) else locate(args.source, args.data)
    tokens = prepare_shards(
        source, args.out, tokenizer=args.tokenizer, field=args.field, workers=args.workers,
        shard_tokens=args.shard_tokens, report=Progress().show,
    )  # fmt: skip
    report = {"out": args.out, "tokens": tokens, "tokenizer": args.tokenizer}
    print(json.dumps(report) if args.json else f"{tokens:,} tokens in {args.out}")
    return 0


class Progress:
    """Parts done, tokens, and tokens per second since the start; a line every second at most."""

    def __init__(self) -> None:
        self.start, self.shown, self.before = time.monotonic(), 0.0, -1

    def show(self, done: int, units: int, tokens: int) -> None:
        self.before = tokens if self.before < 0 else self.before
        now = time.monotonic()
        if now - self.shown >= 1 or done == units:
            self.shown = now
            speed = (tokens - self.before) / max(1e-9, now - self.start)
            print(f"{done}/{units} parts  {tokens:,} tokens  {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
