"""What docs/scale.md promises of many processes, measured on the CPU: kills, a long document, a plan.

python -m recipes.scale_checks --kills 20
python -m recipes.scale_checks --hosts 3    # of one of two hosts: Linux, root; a result of its own
python -m recipes.scale_checks --table
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from nestling.bench.measure import peak_bytes
from nestling.bench.plan import GPUS, measure, plan, trainer_of
from nestling.core.state import nbytes
from nestling.models import config_of
from nestling.train import ModelChoice, RunConfig, TrainConfig
from nestling.train.optimizer import optimizer_tree
from recipes.cells import Cell, cell, cpu_minutes, write_result

NAME, HOSTS = "scale_checks", "scale_hosts"
TOKENS = 1 << 18
DRILLS = {  # who starts the ranks again: this process, or torchrun
    "kills": "tests.train.distributed_kill_drill",
    "torchrun": "tests.train.torchrun_kill_drill",
}
HOST_DRILL = "tests.train.host_kill_drill"
MODEL = config_of("hope", dim=64, depth=6, heads=2, periods=(128.0, 256.0))
CONFIG = RunConfig(model=ModelChoice(name="hope"), train=TrainConfig(rows=6, length=256, stream_length=1 << 20))


def said(*command: str) -> Cell:
    """The last line that a command prints."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True)
    return {"command": " ".join(["python -m", *command]), "said": done.stdout.splitlines()[-1]}


def killed(drill: str, kills: int) -> Cell:
    """Every kill of a drill, with its moment, and what the runs came to."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        told = said(drill, "--kills", str(kills), "--log", str(log))
        command = told["command"].partition(" --log")[0]
        return {"command": command} | json.loads(log.read_text(encoding="utf-8"))


def document() -> Cell:
    """Loss and gradients of a long document on one and on two processes."""
    return json.loads(said("tests.distributed.long_document", "--tokens", str(TOKENS))["said"])


def planned() -> Cell:
    """Bytes and seconds of a step of six blocks and six rows: what the plan says, and what they are."""
    made = plan(CONFIG, MODEL, 1, GPUS["h100"], measure(CONFIG, MODEL, rows=CONFIG.train.rows))
    trainer = trainer_of(CONFIG, MODEL, CONFIG.train.rows, "cpu")
    for _ in range(3):
        trainer.next_step()
    working = peak_bytes(trainer.next_step)
    assert trainer.state is not None
    kept = 4 * trainer.model.num_parameters() + nbytes(optimizer_tree(trainer.optimizer)) + nbytes(trainer.state.tree)
    began = time.process_time()
    for _ in range(3):
        trainer.next_step()
    seconds = (time.process_time() - began) / 3
    return {"bytes": {"planned": made.bytes, "measured": kept + working},
            "seconds": {"planned": made.seconds, "measured": seconds}}  # fmt: skip


def table(metrics: Cell) -> str:
    """The page."""
    long, made = metrics["document"], metrics["plan"]
    lines = ["| what | result |", "|---|---|"]
    lines += [
        f"| `{metrics[name]['command']}` | {metrics[name]['said']} |" for name in (*DRILLS, "hosts") if name in metrics
    ]
    lines += [
        f"| {long['tokens']:,} tokens on two processes and on one | loss differs by {long['loss_difference']:.1e}, "
        f"gradients by {long['gradient_difference']:.1e} of the largest entry of each tensor |"
    ]
    for name, unit in (("bytes", 2**20), ("seconds", 1.0)):
        a, b = made[name]["planned"] / unit, made[name]["measured"] / unit
        lines += [
            f"| planned {name if unit == 1 else 'MiB'} of a step | {a:.2f}, measured {b:.2f} ({a / b - 1:+.1%}) |"
        ]
    return "\n".join([*lines, "", f"{cpu_minutes(metrics):.1f} CPU minutes"])


def hosts(kills: int) -> None:
    """Kill one of two hosts, and write that result."""
    made = cell(Path("runs") / NAME, f"hosts-{kills}", partial(killed, HOST_DRILL, kills))
    print(write_result(HOSTS, {"kills": kills}, [0], {"hosts": made}))


def newest(name: str) -> Cell:
    """The metrics of the newest committed result."""
    path = max(Path("results", name).glob("*.json"))
    return json.loads(path.read_text(encoding="utf-8"))["metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of one of two ranks, at random moments; 0 = none")
    parser.add_argument("--hosts", type=int, default=0, help="kill one of two hosts so often, and nothing else")
    parser.add_argument("--table", action="store_true", help="print the page of the newest results")
    chosen = parser.parse_args()
    if chosen.table:
        print(table(newest(NAME) | newest(HOSTS)))
        return
    if chosen.hosts:
        return hosts(chosen.hosts)
    torch.set_num_threads(1)
    folder = Path("runs") / NAME
    metrics = {
        "plan": cell(folder, "plan", planned),
        "document": cell(folder, "document", document),
    }
    for name, drill in DRILLS.items() if chosen.kills else ():
        metrics[name] = cell(folder, f"{name}-{chosen.kills}", partial(killed, drill, chosen.kills))
    config = {"kills": chosen.kills, "tokens": TOKENS, "planned": asdict(MODEL)}
    print(write_result(NAME, config, [0], metrics))
    print(table(metrics))


if __name__ == "__main__":
    main()
