"""The restart: a new process that knows only files loads model and memory, and reads on.

python -m nestling.demo.restart      a request as JSON on stdin, the answer as JSON on stdout
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.core.state import flatten
from nestling.evals import Reads, read_text
from nestling.models import State, load_state


def digest(named: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bits of tensors."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def going_on(model: Reads, state: State, tokens: list[int]) -> dict[str, Any]:
    """What both processes compare: the state's tensors, and the losses when reading on with it."""
    named, _ = flatten(state.tree)
    read = read_text(model, torch.tensor([tokens]), state=state)
    return {"tensors": len(named), "state": digest(named), "losses": digest({"losses": read.losses})}


def in_a_new_process(run: Path, memory: Path, tokens: list[int]) -> dict[str, Any]:
    """`going_on` of a new process. Raises RuntimeError with its last line if it fails."""
    request = {"run": str(run), "memory": str(memory), "tokens": tokens, "threads": torch.get_num_threads()}
    here = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (here, os.environ.get("PYTHONPATH")) if path)
    ended = subprocess.run(
        [sys.executable, "-m", "nestling.demo.restart"],
        input=json.dumps(request), env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        last = ended.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the process that restores the memory ended with {ended.returncode}: {last[-1]}")
    return json.loads(ended.stdout)


def main() -> None:
    """Answer the request."""
    from nestling.train import load_run

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    model, _ = load_run(request["run"])
    answer = going_on(model.eval(), load_state(request["memory"]), request["tokens"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
