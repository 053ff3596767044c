"""`nestling doctor`: what is installed, which form of each op is chosen here and why, and whether a model trains,
reads, saves and restores on this machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nestling.cli.parser import Parser
from nestling.version import __version__

EPILOG = (
    "Exit code 1 if a check fails. Missing optional packages are not failures: the extra that brings each is named.\n"
)
EXTRAS = {"matplotlib": "plot", "tokenizers": "bpe", "tensorboard": "track", "rich": "cli", "triton": "kernels-test"}


def run(parser: Parser, arguments: list[str]) -> int:
    """Print what was found; returns 1 if a check failed."""
    args = parser.read(arguments)
    facts = machine() | packages() | forms()
    checks = {name: outcome(check) for name, check in CHECKS.items()}
    failed = [name for name, (good, _) in checks.items() if not good]
    if args.json:
        said = {name: {"ok": good, "found": found} for name, (good, found) in checks.items()}
        print(json.dumps({"facts": facts, "checks": said, "ok": not failed}, indent=2))
        return bool(failed)
    for fact, value in facts.items():
        print(f"      {fact}: {value}")
    for name, (good, found) in checks.items():
        print(f"{'ok  ' if good else 'FAIL'}  {name}: {found}")
    print(f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")
    return bool(failed)


def machine() -> dict[str, str]:
    """Python, processor, threads, device, free disk."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; the CPU is used"
    return {
        "nestling": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()}, threads of torch: {torch.get_num_threads()}",
        "accelerator": device,
        "free disk here": f"{shutil.disk_usage('.').free / 1e9:.1f} GB",
        "data folder": os.environ.get("NESTLING_DATA") or "NESTLING_DATA is not set; bundled texts only",
    }


def packages() -> dict[str, str]:
    """Versions of what is needed, and of what is optional."""
    found = {"torch": torch.__version__} | {name: installed(name) or "missing" for name in ("numpy", "safetensors")}
    missing = "missing; pip install 'nestling[{}]'"
    return found | {name: installed(name) or missing.format(extra) for name, extra in EXTRAS.items()}


def forms() -> dict[str, str]:
    """What `dispatch` runs for a long call of each op here, at its default widths, and why."""
    from nestling.bench import chosen

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {f"form of {op}": f"{form}: {reason}" for op, (form, reason) in chosen(device).items()}


def installed(name: str) -> str | None:
    """The version of a package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version" if find_spec(name) else None


def outcome(check: Callable[[], str]) -> tuple[bool, str]:
    """Whether a check passes, and what it says; whatever it raises is its failure."""
    try:
        return True, check()
    except Exception as error:
        return False, f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_versions() -> str:
    """Python and torch are in the range of the package."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if sys.version_info < (3, 11) or not (2, 11) <= release < (2, 14):
        raise RuntimeError(
            f"Python {platform.python_version()}, torch {torch.__version__}; install >=3.11, >=2.11,<2.14"
        )
    return f"torch {torch.__version__}"


def check_text() -> str:
    """The bundled texts are whole."""
    from nestling.data import TEXTS, bundled_text

    return f"{sum(len(bundled_text(name)) for name in TEXTS):,} characters in {len(TEXTS)} texts"


def small() -> tuple[Any, torch.Tensor]:
    """A Hope of a few thousand parameters, and something to read."""
    from nestling.models import build

    torch.manual_seed(0)
    model = build("hope", dim=32, depth=1, heads=1, periods=(16, 32), chunk_size=16)
    return model, torch.randint(0, model.config.vocab_size, (2, 80))


def check_training() -> str:
    """A step of the optimizer lowers the loss on the tokens it was made on."""
    model, tokens = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, _ = model.loss(tokens)
    before.backward()
    optimizer.step()
    after, _ = model.loss(tokens)
    if not after < before:
        raise RuntimeError(f"loss {float(before):.4f} before a step, {float(after):.4f} after it")
    return f"loss {float(before.detach()):.4f} -> {float(after.detach()):.4f}"


def check_reading() -> str:
    """Two halves of a text give what the whole gives, and the levels are written."""
    model, tokens = small()
    with torch.no_grad():
        whole = model(tokens)
        first = model(tokens[:, :37])
        second = model(tokens[:, 37:], first.state)
    error = (torch.cat([first.logits, second.logits], 1) - whole.logits).abs().max().item()
    writes = second.state.writes[0].tolist()
    if error > 1e-3 or writes != [4, 2]:
        raise RuntimeError(f"halves differ from the whole by {error:.1e}; writes {writes}, expected [4, 2]")
    return f"difference of halves and whole {error:.1e}, writes {writes}"


def check_memory_file() -> str:
    """A saved state comes back with equal bits."""
    from nestling.core.state import tensors
    from nestling.models import load_state, save_state

    model, tokens = small()
    with torch.no_grad():
        state = model(tokens).state
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        save_state(state, path)
        size, back = path.stat().st_size, load_state(path)
    pairs = zip(tensors(state.tree), tensors(back.tree), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError("the restored state differs from the saved one")
    return f"{size:,} bytes, restored with equal bits"


CHECKS: dict[str, Callable[[], str]] = {
    "versions": check_versions,
    "bundled texts": check_text,
    "training": check_training,
    "reading": check_reading,
    "memory file": check_memory_file,
}
