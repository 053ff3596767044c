"""Every bundled data file stands in DATA_LICENSES.md with a source, a licence and the right sha256."""

import hashlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = {".py", ".md", ".toml", ".txt", ".cff", ".sh", ".yaml", ".typed", ".json", ".html", ".svg", ".png", ""}
MiB = 2**20


def rows() -> dict[str, list[str]]:
    """file -> [source, licence, sha256]"""
    table = [line for line in (ROOT / "DATA_LICENSES.md").read_text(encoding="utf-8").split("\n") if line[:3] == "| `"]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in table]
    return {name.strip("| `"): rest for name, *rest in cells}


def data_files() -> set[str]:
    """The files in git that are data: in a folder of texts, or neither code nor a page nor a picture."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = tracked.stdout.split("\n")[:-1]
    return {name for name in names if Path(name).suffix not in CODE or "texts" in Path(name).parts}


@pytest.mark.parametrize("name", rows())
def test_sha256(name: str) -> None:
    source, licence, sha256 = rows()[name]
    assert len(source) > 20 and licence
    assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == sha256


def test_every_data_file_is_listed() -> None:
    assert len(rows()) >= 4
    assert data_files() == set(rows())


def test_sizes() -> None:
    size = {name: (ROOT / name).stat().st_size for name in rows()}
    assert sum(size.values()) <= 8 * MiB
    assert sum(n for name, n in size.items() if name.startswith("nestling/")) <= 1 * MiB
