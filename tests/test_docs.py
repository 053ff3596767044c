"""The documentation is true: its Python runs, its links lead somewhere, its equations name functions and tests."""

import ast
import re
from pathlib import Path

import pytest

from tests.hf.needs import need

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.md", "nestling/**/README.md", "recipes/*.md", "benchmarks/*.md")
PAGES = sorted([path for pattern in PATTERNS for path in ROOT.glob(pattern)])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, source) of every fenced block of Python."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in found]


NEED_TRANSFORMERS = {"docs/hugging_face.md"}
WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace, in an empty folder."""
    if page.relative_to(ROOT).as_posix() in NEED_TRANSFORMERS:
        need("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"snippets of {page.name}"}
    for line, source in blocks(page):
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()]
    assert missing == []


def rows() -> list[list[str]]:
    """The cells of every row of docs/equations.md."""
    lines = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").split("\n")
    table = [line for line in lines if line.startswith("|") and not line.startswith(("|---", "| equation |"))]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in table]


def names_in(path: Path) -> set[str]:
    """Every function, class and method of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    methods = {
        f"{c.name}.{f.name}"
        for c in ast.walk(tree)
        if isinstance(c, ast.ClassDef)
        for f in c.body
        if isinstance(f, kinds)
    }
    return methods | {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def missing(cell: str, root: Path) -> list[str]:
    """The references of a cell that lead nowhere: `file.py: name`, `name` of the file before, `folder`."""
    lost, file = [], root
    for reference in re.findall(r"`([^`]+)`", cell):
        place, colon, name = reference.partition(": ")
        if colon or "/" in place:
            file = root / place
        else:
            name = place
        if not file.exists() or (name and name not in names_in(file)):
            lost.append(reference)
    return lost


def test_every_equation_names_a_function_and_a_test_that_exist() -> None:
    assert len(rows()) >= 20
    for row in rows():
        assert len(row) == 4, row
        equation, code, test, deviation = row
        assert equation and deviation, row
        assert missing(code, ROOT / "nestling") == [], equation
        assert "`" in test, f"{equation} has no test"
        assert missing(test, ROOT / "tests") == [], equation
