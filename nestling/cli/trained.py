"""What several commands share: the trained model of a run, and a memory file that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.cli.parser import Parser

if TYPE_CHECKING:
    from nestling.data import Tokenizer
    from nestling.models import LanguageModel, State


def add_model(parser: Parser) -> None:
    """The options --model and --device."""
    parser.add_argument("--model", metavar="RUN", required=True, help="the folder of a run of `nestling train`")
    parser.add_argument("--device", default="cpu", help="device of torch (default: cpu)")


def load_model(run: str, device: str) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of a run folder, ready to read. Raises FileNotFoundError or ValueError."""
    from nestling.train import load_run

    if not Path(run).is_dir():
        raise FileNotFoundError(f"--model={run} is not a folder; give the folder of a run, e.g. runs/train-1")
    try:
        place = torch.device(device)
        model, tokenizer = load_run(run)
        return model.to(place).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device} cannot be used: {str(error).splitlines()[0]}; use cpu") from error


def tokens_of(text: str, tokenizer: Tokenizer, device: str) -> Tensor:
    """A text as one row of ids, (1, T)."""
    return torch.as_tensor(tokenizer.encode(text), dtype=torch.long, device=device)[None]


def load_memory(path: str | None, device: str) -> State | None:
    """The state in a memory file; None without a path, or where no file is there yet."""
    from nestling.models import load_state

    return load_state(path, map_location=device) if path and Path(path).exists() else None
