"""`nestling generate`: continue a prompt, with what a memory file remembers."""

from __future__ import annotations

import json
import sys

import torch

from nestling.cli import trained
from nestling.cli.parser import Parser, UsageError

EPILOG = """\
  nestling generate --model runs/train-1 --prompt "ROMEO:" --tokens 300
  nestling generate --model runs/train-1 --prompt "Call me" --state memory.safetensors

The memory file is read, not written: to keep what was learned, use `nestling read`.
"""


def run(parser: Parser, arguments: list[str]) -> int:
    """Print the prompt and its continuation."""
    trained.add_model(parser)
    parser.add_argument("--prompt", default="\n", help="the text to continue (default: a line break)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest")
    parser.add_argument("--top-p", type=float, help="choose among the fewest that have this much probability")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    parser.add_argument("--state", metavar="FILE", help="start with the memory in this file")
    parser.add_argument(
        "--learned-only", action="store_true", help="of the memory file, without the context it ended in"
    )
    parser.add_argument("--learn-output", action="store_true", help="learn from the model's own words too")
    args = parser.read(arguments)
    if args.prompt == "":
        raise UsageError("--prompt is empty; give at least one character")
    model, tokenizer = trained.load_model(args.model, args.device)
    state = trained.load_memory(args.state, args.device, learned_only=args.learned_only) if args.state else None
    made = model.generate(
        trained.tokens_of(args.prompt, tokenizer, args.device), args.tokens, state,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, learn_output=args.learn_output,
        generator=torch.Generator(device=args.device).manual_seed(args.seed),
    ).all()[0]  # fmt: skip
    text = tokenizer.decode(made.tolist())
    if args.json:
        print(json.dumps({"prompt": args.prompt, "text": text, "tokens": made.tolist(), "seed": args.seed}))
    else:
        sys.stdout.write(f"{args.prompt}{text}\n")
    return 0
