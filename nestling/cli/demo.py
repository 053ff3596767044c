"""`nestling demo`: the main job in minutes on a CPU: train, read, remember, report."""

from __future__ import annotations

from nestling.cli.parser import Parser

EPILOG = "The report goes to a new folder demo-N below --out, never over an old one.\n"


def run(parser: Parser, arguments: list[str]) -> int:
    """Run the demo."""
    parser.add_argument("--quick", action="store_true", help="a run of seconds that shows the parts, not the result")
    parser.add_argument("--out", default="runs", help="where the folder of the demo is made (default: runs)")
    args = parser.read(arguments)

    from nestling import demo

    demo.run(args.out, quick=args.quick)
    return 0
