"""The demo from beginning to end, in its quick form, twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestling.demo import Demo, restart, run
from nestling.demo.run import new_folder, one_thread
from nestling.demo.settings import full_settings, quick_settings
from nestling.demo.stages import level_names, trained
from nestling.evals import read_text
from nestling.models import build, count, load_state
from nestling.train import TrainResult, load_run


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Demo, list[str]]:
    """Two runs with the same folder, and what they printed."""
    out, said = tmp_path_factory.mktemp("demo") / "runs", []
    return run(out, quick=True, say=said.append), run(out, quick=True, say=said.append), said


def without_times(value):
    """The same numbers without those that a clock gave."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "date", "commit")}
    return value


def test_twice_gives_two_folders_and_equal_numbers(demos) -> None:
    first, second, _ = demos
    assert (first.folder.name, second.folder.name) == ("demo-1", "demo-2")
    for demo in (first, second):
        assert {p.name for p in demo.folder.iterdir()} == {
            "hope", "transformer", "memory.safetensors", "report.html", "results.json"
        }  # fmt: skip
        assert demo.report.is_file()
    a, b = (json.loads((demo.folder / "results.json").read_text()) for demo in (first, second))
    assert without_times(a) == without_times(b)
    assert a["metrics"]["reading"]["hope-learning"]["whole"] == first.results.reading["hope-learning"].whole


def test_the_memory_came_back_with_equal_bits(demos) -> None:
    demo = demos[0]
    kept = demo.results.memory
    assert kept.equal_state
    assert kept.equal_reading
    assert kept.bytes == (demo.folder / kept.file).stat().st_size
    model, _ = load_run(demo.folder / "hope")
    state = load_state(demo.folder / kept.file)
    assert state.tokens.tolist() == [demo.results.read_tokens]
    assert state.writes.tolist() == [list(demo.results.reading["hope-learning"].writes[-1].counts)]
    read_text(model, torch.randint(256, (1, 40)), state=state)  # the run's model accepts it


def test_a_changed_memory_would_be_noticed(demos) -> None:
    demo = demos[0]
    model, _ = load_run(demo.folder / "hope")
    state = load_state(demo.folder / "memory.safetensors")
    tokens = torch.randint(256, (60,)).tolist()
    as_it_is = restart.going_on(model, state, tokens)
    assert as_it_is == restart.going_on(model, state, tokens)
    path = next(path for path, level in state.tree.fast.items() if level.delta)
    matrix = next(iter(state.tree.fast[path].delta.values()))
    part = next(t for t in vars(matrix).values() if isinstance(t, torch.Tensor))
    part.view(-1)[0] += 1.0
    changed = restart.going_on(model, state, tokens)
    assert changed["state"] != as_it_is["state"]
    assert changed["losses"] != as_it_is["losses"]


def test_models_have_equal_parameters_and_tokens(demos) -> None:
    r = demos[0].results
    hope, transformer = r.training["hope"], r.training["transformer"]
    assert abs(hope.parameters / transformer.parameters - 1) < 0.02
    assert hope.tokens == transformer.tokens
    assert hope.validation[-1][0] == hope.tokens
    assert len(hope.validation) == 3


def test_every_level_wrote_while_reading(demos) -> None:
    r = demos[0].results
    settings = quick_settings(0)
    periods = [p for p in settings.hope.model.periods or () if p < float("inf")]
    last = r.reading["hope-learning"].writes[-1]
    assert list(last.counts) == [(settings.read - 1) // p for p in periods]
    assert all(norm > 0 for norm in last.norms.values())
    assert not any(r.reading["hope-frozen"].writes[-1].counts)
    assert r.reading["hope-learning"].whole != r.reading["hope-frozen"].whole
    assert r.forgetting.after != r.forgetting.before


def test_report_and_account(demos) -> None:
    demo, _, said = demos
    written = demo.report.read_text()
    assert written.count("<svg") == written.count("</svg>") == 5
    for heading in ("It learns", "It keeps learning", "What it writes", "Its levels", "In its own words"):
        assert f"<h2>{heading}</h2>" in written
    printed = "\n".join(said)
    for number in (demo.results.held_out["hope"].short, demo.results.reading["transformer"].second_half):
        assert f"{number:.4f}" in printed
        assert f"{number:.4f}" in written
    assert "equal bits" in printed
    assert str(demo.report) in printed
    assert len(demo.results.samples.before.encode()) >= quick_settings(0).sample


def test_the_text_to_read_is_not_trained_on() -> None:
    for settings in (full_settings(0), quick_settings(0)):
        assert {settings.hope.data.text, settings.transformer.data.text} == {"shakespeare"}
        assert settings.hope.train == settings.transformer.train
        assert settings.hope.optim == settings.transformer.optim


def test_full_settings_have_equal_parameters_and_write_often() -> None:
    settings = full_settings(3)
    hope, transformer = (build(c.model.name, **c.model.overrides()) for c in (settings.hope, settings.transformer))
    assert abs(count(hope.config) / count(transformer.config) - 1) < 0.02
    assert transformer.config.window == settings.length == 256
    finite = [p for p in hope.config.periods if p < float("inf")]
    assert len(finite) >= 2
    assert settings.hope.train.stream_length / max(finite) >= 4
    assert settings.read / max(finite) >= 16
    assert settings.hope.train.seed == 3


def test_new_folders_spare_old_ones(tmp_path: Path) -> None:
    (tmp_path / "demo-1").mkdir()
    (tmp_path / "demo-1" / "mine.txt").write_text("kept")
    (tmp_path / "demo-2").write_text("a file")
    assert new_folder(tmp_path) == tmp_path / "demo-3"
    assert (tmp_path / "demo-1" / "mine.txt").read_text() == "kept"
    assert (tmp_path / "demo-2").read_text() == "a file"


def test_missing_matplotlib_is_said_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("nestling[plot]")):
        run(tmp_path / "runs", quick=True)
    assert not (tmp_path / "runs").exists()


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match=r"short.txt has 10 bytes, the demo reads 2,176; give a longer text"):
        run(tmp_path / "runs", quick=True, text="short.txt", data=tmp_path)
    with pytest.raises(FileNotFoundError, match="NESTLING_DATA"):
        run(tmp_path / "runs", quick=True, text="missing.txt")
    assert not (tmp_path / "runs").exists()


def test_a_stopped_training_stops_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = TrainResult(step=1, finished=False, stopped_by="SIGINT")
    monkeypatch.setattr("nestling.train.run", lambda config, folder: (None, stopped))
    with pytest.raises(KeyboardInterrupt):
        trained(quick_settings(0).hope, tmp_path)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_restart_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 1: FileNotFoundError: no run.json in"):
        restart.in_a_new_process(tmp_path, tmp_path / "memory", [1, 2, 3])


def test_levels_are_named_by_block_and_period() -> None:
    model = build("hope-attention", dim=16, depth=2, heads=2, periods=(16, 1024))
    paths = list(read_text(model, torch.randint(256, (1, 20))).writes[-1].norms)
    assert list(level_names(model, paths).values()) == [
        "block 0, every 16 tokens", "block 0, every 1,024 tokens",
        "block 1, every 16 tokens", "block 1, every 1,024 tokens",
    ]  # fmt: skip


def test_the_command_runs_elsewhere(tmp_path: Path) -> None:
    """`nestling demo` refuses wrong options in one line, and makes nothing."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "nestling", "demo", "--quik"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines() == [ended.stderr.strip()]
    assert "--quick" in ended.stderr
    assert list(tmp_path.iterdir()) == []
