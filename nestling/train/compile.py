"""Compiled blocks in training: for which pieces of text, and on which machines."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from nestling.models.compiled import CompiledRead
from nestling.train.config import RunConfig
from nestling.train.parallel.ranks import Ranks

BACKEND = "inductor"  # of torch.compile


def compile_blocks(model: Any, config: RunConfig, ranks: Ranks) -> None:
    """Let all blocks of a model read the usual pieces of a run's text through graphs, made when they first come.

    The usual piece has all rows that a rank reads at once, and as many tokens as the shortest period, or as a step
    where that is less. Documents that end elsewhere leave shorter pieces, which are read as ever.
    Raises ValueError for a model with exact outer gradients or split maps, and where there is no C++ compiler.
    """
    if model.config.bptt:
        raise ValueError(
            f"train.compile with bptt={model.config.bptt}: exact outer gradients differentiate twice, which compiled "
            "blocks cannot; leave out one of the two"
        )
    if ranks.tensor > 1:
        raise ValueError(
            f"train.compile with parallel.tensor={ranks.tensor}: graphs take whole maps; leave out one of the two"
        )
    require_compiler()
    rows, length = config.rows_per_part(ranks.size), config.train.length // ranks.sequence
    CompiledRead(rows, int(min(length, *model.config.periods)), BACKEND).give(model)


def require_compiler() -> None:
    """Raise ValueError if the compiler that the backend calls is not here."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if BACKEND == "inductor" and shutil.which(name) is None:
        raise ValueError(
            f"train.compile needs the C++ compiler {name}, and there is none; install it, name another one in the "
            "environment variable CXX, or leave out train.compile"
        )
