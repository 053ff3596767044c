"""What several commands share: the trained model of a run, its text, and a memory file that belongs to it."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from nestling.data import Tokenizer
    from nestling.models import ReadingModel, State


def add_model(parser: Parser) -> None:
    """The options --model and --device."""
    parser.add_argument("--model", metavar="RUN", required=True, help="the folder of a run, or of a converted model")
    parser.add_argument("--device", default="cpu", help="device of torch (default: cpu)")


def add_text(parser: Parser) -> None:
    """The argument FILE and the option --data."""
    parser.add_argument("file", help="a text file, a folder of .txt files, or the name of a bundled text, e.g. emma")
    parser.add_argument("--data", metavar="DIR", help="where data files lie (default: $NESTLING_DATA)")


def add_writes(parser: Parser) -> None:
    """The options --rate, --erase and --period, which `written` reads."""
    parser.add_argument("--rate", type=float, help="rate of all levels while reading (default: as the model was built)")
    parser.add_argument("--erase", type=float, help="part of what earlier writes said about a key that a write erases")
    parser.add_argument("--period", type=float, help="one period for all levels that write, in tokens")


def load_model(run: str, device: str) -> tuple[ReadingModel, Tokenizer]:
    """Model and tokenizer of a run folder, ready to read. Raises FileNotFoundError or ValueError."""
    from nestling.train import load_run

    if not Path(run).is_dir():
        raise FileNotFoundError(f"--model={run} is not a folder; give the folder of a run, e.g. runs/train-1")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device} cannot be used: {str(error).splitlines()[0]}; use cpu") from error
    if (Path(run) / "config.json").is_file():
        return load_saved(run, place)
    model, tokenizer = load_run(run)
    return model.to(place).eval(), tokenizer


def written(model: ReadingModel, args: Namespace) -> ReadingModel:
    """The model with the writes that the options ask for. A memory belongs to the options that it was made with."""
    from nestling.evals import reconfigured
    from nestling.models import LanguageModel

    changes: dict[str, Any] = {"inner_lr": args.rate, "inner_erase": args.erase, "periods": args.period}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return model
    if not isinstance(model, LanguageModel):
        raise UsageError(
            "--rate, --erase and --period change models of `nestling train`; see nestling convert --help for others"
        )
    if args.period is not None:
        changes["periods"] = tuple(p if math.isinf(p) else args.period for p in model.config.periods)
    return reconfigured(model, **changes)


def load_saved(folder: str, place: torch.device) -> tuple[ReadingModel, Tokenizer]:
    """Model and tokenizer of a folder that `nestling convert` made. Raises ValueError if it is another one's."""
    from nestling.hf.files import is_ours, load

    if not is_ours(folder):
        raise ValueError(f"--model={folder} holds a plain model; make levels of its MLPs first: nestling convert")
    model, tokenizer = load(folder)
    return model.to(place).reader, tokenizer


def tokens_of(text: str, tokenizer: Tokenizer, device: str) -> Tensor:
    """A text as one row of ids, (1, T)."""
    return torch.as_tensor(tokenizer.encode(text), dtype=torch.long, device=device)[None]


def text_of(name: str, data: str | None) -> str:
    """The whole text of a file, folder or bundled name."""
    from nestling.data import load_documents

    return "\n".join(load_documents(name, data))


def load_memory(path: str, device: str, *, learned_only: bool = False) -> State:
    """The state of one sequence in a memory file; `learned_only` = without the context it ended in."""
    from nestling.models import load_state

    state = load_state(path, map_location=device)
    if state.rows != 1:
        raise ValueError(f"memory file {path} holds {state.rows} sequences; save one with state.select([i])")
    return state.reset_context() if learned_only else state
