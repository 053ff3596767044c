"""Who may import whom: imports point down the list of folders, optional packages are imported where they are used.

The rules are read off the syntax trees, so an import inside a function counts as an edge too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nestling"
MODULES = sorted(PACKAGE.rglob("*.py"))

# folder -> folders of ours that it may import (itself is understood)
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "core": set(),
    "ops": set(),
    "data": set(),
    "testing": {"core", "ops"},
    "optim": {"core", "ops"},
    "introspect": {"core", "optim"},
    "memories": {"core", "ops"},
    "models": {"core", "memories"},
    "train": {"core", "data", "models", "optim", "version"},
    "evals": {"core", "data", "models", "version"},
    "bench": {"core", "data", "memories", "models", "ops", "optim", "testing", "train"},
    "demo": {"core", "data", "evals", "introspect", "models", "train", "version"},
    "sessions": {"core", "memories", "models"},
    "hf": {"core", "memories", "models", "version"},
    "launch": {"train"},
    "cli": {
        "bench",
        "core",
        "data",
        "demo",
        "evals",
        "hf",
        "introspect",
        "launch",
        "models",
        "sessions",
        "train",
        "version",
    },
}
TOP = {"__init__", "__main__"}  # join everything
NEEDED = {"torch", "numpy", "safetensors"}
ONLY_TORCH = {"core", "ops", "optim", "memories"}
WHOLE = {"hf": {"transformers"}}  # folders that exist for a package, which may load it at once
SHARED = {"alignment", "chunks", "delta_chunks", "groups", "walk"}  # modules of ops that every op may import
OPTIONAL = {"datasets", "lm_eval", "matplotlib", "pyarrow", "ray", "tensorboard", "tokenizers"}  # inside functions
KERNELS = {"fla", "triton"}  # in files whose names start so, which dispatch loads when it chooses them
BLOCKED = [*sorted(OPTIONAL | KERNELS), "fastapi", "jaxtyping", "rich", "transformers", "tyro"]


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Each imported name with its statement: `from a.b import c` gives a.b.c, `from . import c` what it stands for."""
    package = ("nestling", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def run_at_import(tree: ast.Module) -> set[ast.stmt]:
    """The import statements that run when the module is loaded: not in a function, not under TYPE_CHECKING."""
    found: set[ast.stmt] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.add(node)
        todo += ast.iter_child_nodes(node)
    return found


def violations(path: Path, source: str) -> list[str]:
    """Every broken rule of one module."""
    tree, here = ast.parse(source), folder(path)
    first, wrong = run_at_import(tree), []
    for node, name in imports(path, tree):
        root, *rest = name.split(".")
        say = f"{path.relative_to(PACKAGE)}:{node.lineno} imports {name}"
        if root == "nestling":
            there = rest[0]
            allowed = here in TOP or there == here or there in MAY_IMPORT[here] or name == "nestling.__version__"
            if not allowed:
                wrong.append(f"{say}: {here} may import {sorted(MAY_IMPORT[here]) or 'nothing'} of ours")
            if there != here and any(part.startswith("_") and not part.startswith("__") for part in rest):
                wrong.append(f"{say}: a name with an underscore stays in its folder")
            if (
                here == there == "ops"
                and len(rest) > 1
                and path.parent.name not in {"ops", rest[1]}
                and rest[1] not in SHARED
            ):
                wrong.append(f"{say}: an op imports its own folder only")
        elif root in KERNELS:
            if not path.name.startswith(root):
                wrong.append(f"{say}: {root} stays in files named {root}*.py")
        elif node in first and root not in sys.stdlib_module_names | NEEDED | WHOLE.get(here, set()):
            wrong.append(f"{say} at module level: import it where it is used")
        elif here in ONLY_TORCH and root not in sys.stdlib_module_names | {"torch", "jaxtyping"}:
            wrong.append(f"{say}: {here} needs torch alone")
        elif root not in sys.stdlib_module_names | NEEDED | OPTIONAL | {"jaxtyping"} | WHOLE.get(here, set()):
            wrong.append(f"{say}: not a dependency of ours")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_module_follows_the_rules(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("core/memory.py", "from nestling.ops import dispatch"),
        ("core/memory.py", "def f():\n    import nestling.memories"),
        ("core/memory.py", "import numpy"),
        ("memories/mlp.py", "from nestling.models import build"),
        ("memories/continuum/level.py", "from ...models import build"),
        ("memories/mlp.py", "from nestling.core.rule import _hidden"),
        ("train/loop.py", "from nestling.evals import perplexity"),
        ("evals/read.py", "import matplotlib"),
        ("evals/read.py", "if True:\n    import tokenizers"),
        ("ops/titans/chunk.py", "from nestling.ops.delta_rule.chunk import delta_rule"),
        ("ops/titans/chunk.py", "def f():\n    import triton"),
        ("ops/titans/triton.py", "import fla"),
        ("train/loop.py", "def f():\n    import pandas"),
        ("models/lm.py", "import transformers"),
        ("evals/read.py", "def f():\n    import transformers"),
        ("hf/convert.py", "from nestling.train import load_run"),
    ],
)
def test_the_rules_catch(where: str, source: str) -> None:
    assert len(violations(PACKAGE / where, source)) == 1


def test_imports_point_downward() -> None:
    order = list(MAY_IMPORT)
    assert all(order.index(below) < order.index(above) for above in order for below in MAY_IMPORT[above])
    assert {folder(path) for path in MODULES} - TOP <= set(order)


def whole(module: str) -> bool:
    """Whether a module is there for an optional package: a kernel, or a folder of `WHOLE`."""
    return module.rpartition(".")[2].startswith(tuple(KERNELS)) or module.split(".")[1] in WHOLE


def in_a_fresh_process(code: str) -> str:
    """Run code in a process where the optional packages cannot be imported; returns what it printed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    ran = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_module_loads_without_the_optional_packages() -> None:
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES]
    names = [
        name.removesuffix(".__init__")
        for name in names
        if not name.endswith("__main__") and not (name != "nestling" and whole(name))
    ]
    load = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    printed = in_a_fresh_process(load + "print('all')")
    assert printed == "all\n"


def test_public_names_load_lazily() -> None:
    code = """
import nestling
assert not [m for m in sys.modules if m.startswith("nestling.") and m != "nestling.version"]
for name in ("core", "ops", "optim", "memories", "models", "data", "train", "evals"):
    assert getattr(nestling, name).__name__ == "nestling." + name
    assert name in dir(nestling)
for name in nestling.__all__:
    assert getattr(nestling, name) is not None, name
assert not hasattr(nestling, "no_such_name")
print(nestling.__version__)
"""
    from nestling.version import __version__

    assert in_a_fresh_process(code) == f"{__version__}\n"


def test_import_loads_no_optional_package() -> None:
    code = f"""
import sys, nestling
import nestling.models, nestling.train, nestling.data, nestling.evals, nestling.cli.main, nestling.introspect
print(sorted(set({BLOCKED!r}) & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (ran.stdout, ran.returncode) == ("[]\n", 0), ran.stderr
