"""environment.py says in one line, before it installs anything, what a bare machine lacks."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path):
    """The script, as if it stood in a folder of its own with copies of what it reads."""
    for name in ("environment.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("environment_under_test", tmp_path / "environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stopped(call) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    message = str(stop.value)
    assert "\n" not in message
    return message


def test_syntax_is_understood_by_pythons_that_are_too_old() -> None:
    tree = ast.parse((ROOT / "environment.py").read_text(encoding="utf-8"), feature_version=(3, 4))
    used = {type(node).__name__ for node in ast.walk(tree)}
    assert not used & {"JoinedStr", "AnnAssign", "NamedExpr", "Match"}


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 10)])
def test_old_python(environment, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    monkeypatch.setattr(environment.sys, "version_info", (*version, 0))
    message = stopped(lambda: environment.main(["plot"]))
    assert f"Python is {version[0]}.{version[1]}" in message and "3.11" in message
    assert not os.path.exists(environment.VENV)


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_missing_venv_module(environment, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda n: None if n == missing else found(n))
    message = stopped(lambda: environment.main(["plot"]))
    assert f"module {missing} is missing" in message and "python3-venv" in message
    assert not os.path.exists(environment.VENV)


def test_full_disk(environment, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 3_990_000_000})
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    message = stopped(lambda: environment.main(["plot"]))
    assert "4.0 GB of disk are free" in message or "3.9 GB of disk are free" in message
    assert not os.path.exists(environment.VENV)


def test_no_network_stops_before_the_installation(environment) -> None:
    offline = {k: v for k, v in os.environ.items() if not k.upper().startswith(("PIP_", "HTTP", "ALL_PROXY"))}
    offline |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    ran = subprocess.run(
        [sys.executable, os.path.join(environment.ROOT, "environment.py"), "plot"],
        env=offline, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1 and "no network" in ran.stderr
    assert ran.stdout == "" and not os.path.exists(environment.STAMP)


@pytest.fixture
def calls(environment, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of an environment in which every command succeeds at once."""
    made: list[list[str]] = []

    def call(command: list[str], **kwargs: object) -> int:
        made.append(command)
        os.makedirs(environment.VENV, exist_ok=True)
        return 0

    monkeypatch.setattr(environment.subprocess, "call", call)
    return made


def installations(calls: list[list[str]]) -> list[str]:
    return [command[-1] for command in calls if "install" in command]


def test_a_complete_environment_is_used_again(environment, calls: list[list[str]]) -> None:
    environment.main(["plot", "dev"])
    environment.main(["plot"])
    assert installations(calls) == [".[dev,plot]"]


def test_more_extras_are_added_and_none_dropped(environment, calls: list[list[str]]) -> None:
    environment.main(["plot"])
    environment.main(["dev"])
    environment.main(["plot"])
    assert installations(calls) == [".[plot]", ".[dev,plot]"]


@pytest.mark.parametrize(("has_triton", "expected"), [(False, [".[dev]", ".[dev,kernels-test]"]), (True, [".[dev]"])])
def test_triton_is_left_to_a_torch_that_brings_it(environment, monkeypatch, has_triton: bool, expected: list) -> None:
    made: list[list[str]] = []

    def call(command: list[str], **kwargs: object) -> int:
        made.append(command)
        os.makedirs(environment.VENV, exist_ok=True)
        return int("import triton" in command and not has_triton)

    monkeypatch.setattr(environment.subprocess, "call", call)
    environment.main(["dev", "kernels-test"])
    environment.main(["dev", "kernels-test"])
    assert installations(made) == expected


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(environment, calls: list[list[str]], name: str) -> None:
    environment.main(["plot"])
    with open(os.path.join(environment.ROOT, name), "a") as file:
        file.write("\n# changed\n")
    environment.main(["plot"])
    assert len(installations(calls)) == 2


def test_an_interrupted_installation_is_not_complete(environment, calls: list[list[str]], monkeypatch) -> None:
    def interrupted(command: list[str], **kwargs: object) -> int:
        if "install" in command:
            raise KeyboardInterrupt
        os.makedirs(environment.VENV, exist_ok=True)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(environment.subprocess, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            environment.main(["plot"])
    environment.main(["plot"])
    assert installations(calls) == [".[plot]"]


def test_a_damaged_stamp_installs_again(environment, calls: list[list[str]]) -> None:
    environment.main(["plot"])
    Path(environment.STAMP).write_text(json.dumps({"key": 1}))
    environment.main(["plot"])
    assert len(installations(calls)) == 2


def test_no_python_at_all_is_one_clear_line(tmp_path: Path) -> None:
    ran = subprocess.run(["make", "-C", ROOT, "PYTHON=no-such-python", "demo"], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "no program no-such-python: install Python 3.11 or newer" in ran.stderr


def test_clean_lists_what_it_removes(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("runs/demo-1", "dist", "package/__pycache__", "kept"):
        (tmp_path / name).mkdir(parents=True)
    make = ["make", "--no-print-directory", "clean"]
    ran = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(ran.stdout.split("\n")) == sorted(
        ["", "removing dist", "removing runs", "removing ./package/__pycache__"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "kept", "package"]
