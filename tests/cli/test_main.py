"""The command line as a user meets it: output, exit codes, and errors of one line that name the remedy."""

import json
import lzma
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nestling.cli.main import COMMANDS, main
from nestling.evals import BABILONG, NEEDLES
from nestling.ops import dispatch
from tests.evals.test_babilong import pack

ROOT = Path(__file__).parents[2]
TINY = [
    *("--model.dim", "32", "--model.depth", "1", "--model.heads", "1", "--model.periods", "16", "32"),
    *("--model.chunk_size", "16"),
    *("--train.rows", "2", "--train.length", "32", "--train.stream_length", "128", "--train.eval_windows", "2"),
    *("--train.calibrate_every", "0", "--optim.warmup_steps", "1"),
]
FOUR = [*TINY, "--train.steps", "4", "--train.checkpoint_every", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--out", str(folder), *FOUR]) == 0
    return folder


def failing(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a command that must fail: nothing on stdout, one line on stderr, which is returned without its start."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.rstrip("\n").split("\n")
    assert len(lines) == 1, said.err
    assert lines[0].startswith("nestling: error: ")
    return lines[0].removeprefix("nestling: error: ")


def passing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must succeed; returns its stdout."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys) -> None:
    assert passing(capsys) == passing(capsys, "--help") == passing(capsys, "help")
    assert all(f"\n  {name} " in passing(capsys) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys) -> None:
    out = passing(capsys, command, "--help")
    assert out.startswith(f"usage: nestling {command}")
    assert "--json" in out


def test_bench_prints_a_table_behind_the_gate(capsys) -> None:
    told = json.loads(passing(capsys, "bench", "--quick", "--json"))
    assert {row["gate"] for row in told["tables"]["ops"]} == {"reference", "green"}
    assert told["threads"] == 1
    assert "transformer block" in passing(capsys, "bench", "length", "--quick")


def test_version(capsys) -> None:
    from nestling import __version__

    assert passing(capsys, "--version") == f"nestling {__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("doctor --jsn", "unknown option --jsn of nestling doctor; did you mean --json?"),
        ("bench ops2", "unknown suite 'ops2'; did you mean ops?"),
        ("bench --threads 0", "argument --threads: '0' is not a whole number of at least 1; see nestling bench --help"),
        ("doctor twice", "unexpected argument 'twice'; see nestling doctor --help"),
        ("train --steps 3", "unknown option --steps of nestling train; did you mean --train.steps?"),
        ("train --train.stepz 3", "unknown option --train.stepz; did you mean --train.steps?"),
        ("train --train.steps x", "--train.steps=x is not of type int; give a value of that type"),
        ("train a.py:f --resume r", "recipe and resume cannot be combined; give one of them"),
        ("train --resume r --out q", "--out cannot be combined with --resume, which goes on in its own folder"),
        ("train --checkpoint c", "--checkpoint=c needs the run it belongs to; add --resume RUN"),
        ("generate --prompt x", "the following arguments are required: --model; see nestling generate --help"),
        ("levels hoppe", "model 'hoppe' is no name, run folder or FILE.py:FUNCTION; did you mean hope?"),
        ("levels hope --optimizer adamw", "unknown optimizer 'adamw'; did you mean AdamW?"),
        ("levels hope --optimizer.lr 1", "--optimizer.lr needs an optimizer; add --optimizer NAME"),
        ("levels hope --optimizer SGD --optimizer.momntum 1", "optimizer SGD refuses its options"),
        ("levels torch.nn:ReLU --model.dim 3", "--model.dim sets a size of a named model, and 'torch.nn:ReLU' is none"),
    ],
)
def test_wrong_calls(line: str, message: str, here: Path, capsys) -> None:
    assert failing(capsys, 2, *line.split()).startswith(message)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train none.py:f", "recipe file none.py does not exist"),
        ("train none.py", "recipe 'none.py' names no function; write FILE.py:FUNCTION"),
        ("train no_such_package:f", "recipe module 'no_such_package' is not installed"),
        ("train --resume none", "no run.json in none; give the folder of a run"),
        ("train --config none.json", "no config file none.json"),
        ("train --data.text none.txt", "no data file none.txt in"),
        ("train --model.heads 3", "dim=128 does not split into heads=3"),
        ("train --model.periods 16 24", "period 24 is not a multiple of the shortest period 16"),
        ("train --model.name hoppe", "unknown model 'hoppe'"),
        ("train --train.stream_length 100", "train.stream_length=100 is not a multiple of train.length=256; use 0"),
        ("generate --model none", "--model=none is not a folder; give the folder of a run"),
        ("levels torch.nn:Linear", "model torch.nn:Linear cannot be called without arguments: missing a required"),
        ("levels torch.nn:Lineer", "model torch.nn has no function 'Lineer'"),
        ("levels math:floor", "model math:floor cannot be called without arguments"),
        ("levels platform:system", "model platform:system returns str; it must return a torch.nn.Module"),
    ],
)
def test_impossible_wishes(line: str, message: str, here: Path, capsys) -> None:
    assert failing(capsys, 1, *line.split()).startswith(message.removesuffix("; use 0"))
    assert list(here.iterdir()) == []


def test_text_files_that_cannot_be_read(here: Path, capsys) -> None:
    (here / "empty.txt").write_bytes(b"")
    (here / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    assert "empty.txt is empty" in failing(capsys, 1, "train", *TINY, "--data.text", "empty.txt")
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 3" in failing(
        capsys, 1, "train", *TINY, "--data.text", "latin.txt"
    )


def test_show_prints_options_that_give_the_same_config(here: Path, capsys) -> None:
    shown = passing(capsys, "train", *FOUR, "--show")
    assert "--train.steps 4\n" in shown and "--model.periods 16.0 32.0\n" in shown
    again = [word for line in shown.splitlines() if not line.endswith("''") for word in line.split()]
    assert passing(capsys, "train", *again, "--show") == shown
    (here / "c.json").write_text(passing(capsys, "train", *FOUR, "--show", "--json"))
    assert passing(capsys, "train", "--config", "c.json", "--show") == shown


def test_a_recipe_is_a_function_of_a_file(here: Path, capsys) -> None:
    (here / "mine.py").write_text(
        "from helper import LR\nfrom nestling.train import RunConfig, OptimConfig\n"
        "def small():\n    return RunConfig(optim=OptimConfig(lr=LR))\n"
        "def wrong():\n    return 3\ndef refuses():\n    raise ValueError('no,\\nnot today; tomorrow')\n"
    )
    (here / "helper.py").write_text("LR = 0.25\n")
    (here / "broken.py").write_text("def f(:\n")
    assert "--optim.lr 0.25\n" in passing(capsys, "train", "mine.py:small", "--show")
    assert "--optim.lr 0.5\n" in passing(capsys, "train", "mine.py:small", "--show", "--optim.lr", 0.5)
    assert failing(capsys, 1, "train", "mine.py:smal") == "recipe mine.py has no function 'smal'; did you mean small?"
    assert failing(capsys, 1, "train", "mine.py:wrong").endswith("returns int; it must return a RunConfig")
    assert failing(capsys, 1, "train", "mine.py:refuses") == "no, not today; tomorrow"
    assert "broken.py is not Python" in failing(capsys, 1, "train", "broken.py:f")


def test_train_writes_a_run_folder_and_never_over_an_old_one(here: Path, capsys) -> None:
    report = json.loads(passing(capsys, "train", *FOUR, "--json"))
    assert report == {"run": "runs/train-1", "step": 4, "finished": True, "stopped_by": ""}
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert "train-1 is not empty" in failing(capsys, 1, "train", *FOUR, "--out", "runs/train-1")
    passing(capsys, "train", "--resume", "runs/train-1")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_gets_the_next_free_number(here: Path, capsys) -> None:
    from nestling.cli.train import next_folder

    (here / "runs" / "train-1").mkdir(parents=True)
    assert next_folder("train") == Path("runs/train-2")
    assert next_folder("hope") == Path("runs/hope-1")


def test_resume_refuses_another_config(trained: Path, here: Path, capsys) -> None:
    assert json.loads(passing(capsys, "train", "--resume", trained, "--json"))["step"] == 4
    assert "optim.lr: 0.002 -> 0.5" in failing(capsys, 1, "train", "--resume", trained, "--optim.lr", 0.5)


def test_generate_repeats_itself_with_a_seed(trained: Path, capsys) -> None:
    line = ["generate", "--model", trained, "--prompt", "A", "--tokens", 9]
    first = passing(capsys, *line, "--json")
    assert len(json.loads(first)["tokens"]) == 9
    assert passing(capsys, *line, "--json") == first
    assert passing(capsys, *line, "--json", "--seed", 1) != first
    assert passing(capsys, *line) == f"A{json.loads(first)['text']}\n"
    assert failing(capsys, 2, *line[:3], "--prompt", "").startswith("--prompt is empty")
    assert failing(capsys, 1, *line, "--temperature", -1) == "temperature=-1.0 must be >= 0; 0 is greedy"
    assert failing(capsys, 1, *line, "--device", "nowhere").startswith("--device=nowhere cannot be used")


@pytest.mark.parametrize("content", [b"", b"nonsense" * 99, b'\x08\0\0\0\0\0\0\0{"a":{}}'])
def test_generate_refuses_a_damaged_memory_file(trained: Path, here: Path, capsys, content: bytes) -> None:
    (here / "m.safetensors").write_bytes(content)
    message = failing(capsys, 1, "generate", "--model", trained, "--state", "m.safetensors")
    assert "m.safetensors" in message and ("damaged" in message or "not a nestling state" in message)
    assert "nothing.safetensors does not exist" in failing(
        capsys, 1, "generate", "--model", trained, "--state", "nothing.safetensors"
    )
    assert (here / "m.safetensors").read_bytes() == content


def test_a_damaged_run_folder_is_refused(trained: Path, here: Path, capsys) -> None:
    import shutil

    shutil.copytree(trained, here / "run")
    for weights in (here / "run").rglob("model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", "--model", str(here / "run")]) == 1
    assert "damaged" in capsys.readouterr().err or "no checkpoint" in capsys.readouterr().err
    (here / "run" / "run.json").write_text("{")
    assert "run.json is damaged" in failing(capsys, 1, "generate", "--model", here / "run")


@pytest.fixture
def text(here: Path) -> str:
    (here / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 4, encoding="utf-8")
    return "text.txt"  # 240 bytes


def test_read_keeps_a_memory_and_goes_on_with_it(trained: Path, text: str, here: Path, capsys) -> None:
    line = ["read", text, "--model", trained, "--state", "m.safetensors", "--json"]
    first = json.loads(passing(capsys, *line))
    assert (first["tokens"], first["writes"]) == (236, [14, 7])
    assert first["state_bytes"] == (here / "m.safetensors").stat().st_size
    second = json.loads(passing(capsys, *line))
    assert second["writes"] == [29, 14]
    assert second["bits_per_byte"] < first["bits_per_byte"]
    kept = (here / "m.safetensors").read_bytes()
    frozen = json.loads(passing(capsys, *line, "--frozen"))
    assert frozen["learn"] is False and "state_bytes" not in frozen
    assert (here / "m.safetensors").read_bytes() == kept
    assert "by_quarter" in frozen and len(frozen["by_quarter"]) == 4


def test_read_with_other_writes(trained: Path, text: str, here: Path, capsys) -> None:
    line = ["read", text, "--model", trained, "--json"]
    own = json.loads(passing(capsys, *line))
    still = json.loads(passing(capsys, *line, "--rate", "0"))
    frozen = json.loads(passing(capsys, *line, "--frozen"))
    often = json.loads(passing(capsys, *line, "--period", "16", "--rate", "0.05", "--erase", "0.5", "--state", "often"))
    assert still["by_quarter"] == pytest.approx(frozen["by_quarter"], rel=1e-5) != own["by_quarter"]
    assert often["writes"] == [(own["tokens"] - 1) // 16] * len(own["writes"])
    failing(
        capsys, 1, "read", text, "--model", trained, "--state", "often"
    )  # a memory belongs to the writes that made it
    assert (here / "often").is_file()


def test_read_compares_with_the_frozen_model(trained: Path, text: str, here: Path, capsys) -> None:
    report = json.loads(passing(capsys, "read", text, "--model", trained, "--compare", "--json"))
    alone = json.loads(passing(capsys, "read", text, "--model", trained, "--frozen", "--json"))
    assert report["frozen"]["by_quarter"] == alone["by_quarter"]
    halves = [sum(numbers["by_quarter"][2:]) for numbers in (report, report["frozen"])]
    assert report["gain"] == pytest.approx(100 * (1 - halves[0] / halves[1]), abs=0.05)
    page = passing(capsys, "read", text, "--model", trained, "--compare")
    assert "  learning  " in page and "  frozen    " in page and "gain by learning on the second half" in page
    assert {path.name for path in here.iterdir()} == {"text.txt"}


def test_read_refuses_what_it_cannot_use(trained: Path, text: str, here: Path, capsys) -> None:
    with_model = ["--model", trained]
    (here / "m.safetensors").write_bytes(b"nothing")
    assert "m.safetensors is damaged" in failing(capsys, 1, "read", text, *with_model, "--state", "m.safetensors")
    assert (here / "m.safetensors").read_bytes() == b"nothing"
    assert failing(capsys, 2, "read", text, *with_model, "--state", "no/m").startswith("--state=no/m lies in a folder")
    assert "not allowed with argument" in failing(capsys, 2, "read", text, *with_model, "--learn", "--frozen")
    assert failing(capsys, 1, "read", "none.txt", *with_model).startswith("no data file none.txt")
    (here / "one.txt").write_text("A")
    assert "need (B, T) with T >= 2" in failing(capsys, 1, "read", "one.txt", *with_model)


def test_a_memory_of_another_model_is_refused(trained: Path, text: str, here: Path, capsys) -> None:
    passing(capsys, "read", text, "--model", trained, "--state", "m.safetensors")
    kept = (here / "m.safetensors").read_bytes()
    passing(capsys, "train", *FOUR, "--train.seed", 5, "--out", "other")
    message = failing(capsys, 1, "read", text, "--model", "other", "--state", "m.safetensors")
    assert message.startswith("the state belongs to model hope-")
    assert (here / "m.safetensors").read_bytes() == kept


def test_eval_perplexity(trained: Path, text: str, here: Path, capsys) -> None:
    line = ["eval", "perplexity", text, "--model", trained, "--length", 64, "--windows", 3]
    report = json.loads(passing(capsys, *line, "--contexts", 8, 32, "--json"))
    assert (report["windows"], report["length"], report["total"]["n"]) == (3, 64, 192)
    assert [c["context"] for c in report["by_context"]] == [8, 32]
    assert f"perplexity {report['perplexity']:.3f}" in passing(capsys, *line)
    passing(capsys, "read", text, "--model", trained, "--state", "m.safetensors")
    learned = json.loads(passing(capsys, *line, "--state", "m.safetensors", "--json"))
    assert learned["nats"] == pytest.approx(report["total"]["nats"])
    assert learned["nats_with_state"] < learned["nats"]
    assert failing(capsys, 2, "eval", "perplexty", text).startswith(
        "unknown suite 'perplexty'; did you mean perplexity"
    )
    assert failing(capsys, 2, *line, "--windows", 0).startswith("argument --windows: '0' is not a whole number")
    assert "fewer than one window of 9001" in failing(capsys, 1, *line[:5], "--length", 9000)
    assert "does not fit into windows" in failing(capsys, 1, *line, "--contexts", 60)


def test_eval_knowledge(trained: Path, here: Path, capsys) -> None:
    (here / "data" / "evals").mkdir(parents=True)
    with lzma.open(here / "data" / "evals" / "squad_dev.jsonl.xz", "wt", encoding="utf-8") as file:
        for town in ("Rome", "Oslo"):
            asked = [{"question": "Where?", "answer": town}, {"question": "How many?", "answer": "Seven"}]
            print(json.dumps({"title": town, "context": f"In {town}. " * 60, "questions": asked}), file=file)
    line = ["eval", "knowledge", "--model", trained, "--data", here / "data", "--times", 2]
    report = json.loads(passing(capsys, *line, "--rate", 0.1, "--period", 16, "--json"))
    assert [c["name"] for c in report["conditions"]] == ["nothing", "own", "another", "context"]
    assert report["bits less"]["2"]["than before"]["n"] == 2
    assert "| own | 2 |" in passing(capsys, *line) and failing(capsys, 2, *line, "--times", 0)
    missing = failing(capsys, 1, *line[:4])
    assert "evals/squad_dev.jsonl.xz" in missing and "--data DIR or the environment variable NESTLING_DATA" in missing


def test_eval_in_context_recall(trained: Path, here: Path, capsys) -> None:
    (here / "data" / "cl").mkdir(parents=True)
    with lzma.open(here / "data" / "cl" / "dbpedia14_10.jsonl.xz", "wt", encoding="utf-8") as file:
        for i in range(60):
            print(json.dumps({"title": f"Lake {i}", "label": "Lake", "text": f"It is a lake number {i}."}), file=file)
    line = ["eval", "in-context-recall", "--model", trained, "--data", here / "data", "--tasks", "records"]
    report = json.loads(passing(capsys, *line, "--lengths", "120-200", "--examples", 3, "--json"))
    assert [s["task"] for s in report["scores"]] == ["records", "records, no document"]
    assert report["scores"][0]["values"] == report["scores"][1]["values"] >= 6
    assert "| records | 120-200 |" in passing(capsys, *line, "--lengths", "120-200", "--examples", 3)
    assert "evals/squad_dev.jsonl.xz" in failing(capsys, 1, *line[:-1], "cloze")


def test_eval_common_sense(trained: Path, here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = ["eval", "common-sense", "--model", trained, "--data", here]
    assert "common sense needs the package lm_eval: pip install 'nestling[eval]'" in failing(capsys, 1, *line)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval", reason="lm-eval is not installed; runs with: pip install 'nestling[eval]'")
        (here / "evals").mkdir()
        item = json.dumps({"query": "Question: why\n", "choices": ["so", "no idea"], "gold": 1})
        (here / "evals" / "piqa.jsonl.xz").write_bytes(lzma.compress(f"{item}\n".encode() * 4))
        line += ["--tasks", "nestling_piqa", "--limit", 3]
        report = json.loads(passing(capsys, *line, "--json", "--learn", "--max-length", 20))
        assert [(s["metric"], s["n"], s["chance"]) for s in report["scores"]] == [("acc", 3, 0.5), ("acc_norm", 3, 0.5)]
        assert "| nestling_piqa | acc, % |" in passing(capsys, *line)


def test_eval_of_suites_that_make_their_examples(trained: Path, here: Path, capsys) -> None:
    line = ["eval", "formal-languages", "--model", trained, "--examples", 3, "--seed", 4]
    report = json.loads(passing(capsys, *line, "--tasks", "parity", "s5", "--lengths", 8, "9-12", "--json"))
    assert [(s["task"], s["shortest"], s["longest"]) for s in report["scores"]] == [
        ("parity", 8, 8), ("parity", 9, 12), ("s5", 8, 8), ("s5", 9, 12)
    ]  # fmt: skip
    assert {(s["n"], s["seed"], s["version"]) for s in report["scores"]} == {(3, 4, 1)}
    needles = passing(capsys, "eval", "needles", "emma", "--model", trained, "--examples", 1, "--lengths", 900)
    assert [row.split(" | ")[0] for row in needles.splitlines()[2:]] == [f"| {name}" for name in NEEDLES]
    (here / "longctx").mkdir()
    pack(here / "longctx", *(f"en/{file}_test_a.txt" for file in BABILONG.values()))
    babilong = ["eval", "babilong", "emma", "--model", trained, "--examples", 2, "--data", here]
    assert "| qa5 | 0-0 |" in passing(capsys, *babilong)
    assert "| qa1 | 300-300 |" in passing(capsys, *babilong, "--tasks", "qa1", "--lengths", 300)
    assert "formal-languages needs 1 or more" in failing(capsys, 2, *line, "--lengths", "0")
    assert "compression" in passing(
        capsys, "eval", "mad", "--model", trained, "--tasks", "compression", "--examples", 1
    )
    assert failing(capsys, 1, "eval", "mqar", "--model", trained).startswith("mqar-4 has 8192 symbols and")
    assert "unknown task 'parrity' of formal-languages; did you mean parity" in failing(
        capsys, 2, *line, "--tasks", "parrity"
    )
    assert "'9-8' is no number of tokens" in failing(capsys, 2, *line, "--lengths", "9-8")


def test_levels_of_a_name_a_run_and_anything_else(trained: Path, here: Path, capsys) -> None:
    named = json.loads(passing(capsys, "levels", "hope", "--model.periods", 16, 64, "--optimizer", "AdamW", "--json"))
    assert {16, 64} <= {box["period"] for box in named}
    assert [box["name"] for box in named][-3:] == ["AdamW.weights", "AdamW.first moment", "AdamW.second moment"]
    assert {16, 32} <= {box["period"] for box in json.loads(passing(capsys, "levels", trained, "--json"))}
    (here / "mine.py").write_text("from torch import nn\ndef make():\n    return nn.LSTM(3, 4)\n")
    assert "LSTM.state" in passing(capsys, "levels", "mine.py:make", "--figure", "deep/levels.svg")
    assert (here / "deep" / "levels.svg").read_text().startswith("<?xml")
    assert "Muon.momentum" in passing(capsys, "levels", "mine.py:make", "--optimizer", "Muon", "--optimizer.lr", 0.1)


def test_doctor_passes_here(capsys) -> None:
    said = json.loads(passing(capsys, "doctor", "--json"))
    assert said["ok"] and all(check["ok"] for check in said["checks"].values())
    assert said["facts"]["torch"] == torch.__version__
    for op in dispatch.FORMS:
        form, reason = dispatch.choose(op, 1024, device="cuda" if torch.cuda.is_available() else "cpu")
        assert said["facts"][f"form of {op}"] == f"{form}: {reason}"
    assert "all 5 checks passed" in passing(capsys, "doctor")


def test_doctor_reports_a_failure(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestling.cli import doctor

    def broken() -> str:
        raise RuntimeError("it is\nbroken")

    monkeypatch.setattr(doctor, "CHECKS", {"one": broken})
    assert main(["doctor"]) == 1
    assert "FAIL  one: RuntimeError: it is broken\n1 of 1 checks failed\n" in capsys.readouterr().out


def test_module_runs_from_a_checkout_and_ends_with_its_exit_code(here: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nestling", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("--version").returncode == 0
    wrong = run("trian")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "nestling: error: unknown command 'trian'; did you mean train?\n"


def test_a_closed_pipe_is_no_error(here: Path) -> None:
    line = f"{sys.executable} -m nestling train --show | head -1"
    ran = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr == "" and ran.stdout.startswith("--model.name")
