"""Ray as a launcher: one run on many workers, or many runs beside each other on the machines of a cluster.

    train_on_ray(config, "runs/four", workers=4)          # a dead worker: all start again from the newest checkpoint
    sweep_on_ray(trials(config, grid), "runs/sweep")      # one run folder per trial, one table; finished ones stay

The training is `nestling.train.run`; Ray starts its processes and starts them again. Run folders and data must be at
the same place on every machine. Needs the extra `ray`.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestling.train import RunConfig, checkpoints, config_from_json, config_to_json, from_dict, read_metrics, run
from nestling.train.checkpoint import step_of
from nestling.train.files import replace_file
from nestling.train.run_folder import RunFolder


def needed() -> Any:
    """The module `ray`, with Ray Train. Raises ImportError naming the extra."""
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise ImportError(f"Ray Train is not installed ({error}); pip install 'nestling[ray]'") from error
    return ray


def train_on_ray(
    config: RunConfig,
    folder: str | Path,
    *,
    workers: int,
    data: str | Path | None = None,
    resume: bool = False,
    restarts: int = 3,
) -> int:
    """Train on `workers` Ray workers, one GPU each where the config names one; the last step that is saved.

    Raises FileExistsError for a folder in use without `resume`, ValueError for a config that does not divide, and
    what Ray Train raises when the run has failed `restarts` + 1 times.
    """
    folder = Path(folder).absolute()
    if RunFolder(folder, {}, say=print).used and not resume:
        raise FileExistsError(f"{folder} is not empty; go on with it (resume), or choose another folder")
    config = replace(config, parallel=replace(config.parallel, ranks=workers))  # every worker checks their number
    ray, gpu = needed(), config.train.device.startswith("cuda")
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config=place(config, folder, data),
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(config.parallel.timeout)
        ),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name=f"{folder.name}-{time.time_ns()}",
            storage_path=str(folder.parent / ".ray"),  # Ray's own notes; nothing of the run lies there
            failure_config=ray.train.FailureConfig(max_failures=restarts),
        ),
    )
    trainer.fit()
    return saved_step(folder)


def place(config: RunConfig, folder: Path, data: str | Path | None) -> dict[str, str]:
    """A run as plain text that another machine can read."""
    where = "" if data is None else str(Path(data).absolute())
    return {"config": config_to_json(config), "folder": str(folder), "data": where, "from": os.getcwd()}


def work(told: Mapping[str, str]) -> None:
    """What a worker does, the first time and after a restart."""
    if Path(told["from"]).is_dir():
        os.chdir(told["from"])  # relative paths of a config mean what they meant to the caller
    run(config_from_json(told["config"]), told["folder"], data=told["data"] or None, resume=True)


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = checkpoints(folder / "checkpoints")
    return step_of(found[-1]) if found else 0


def trials(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> dict[str, RunConfig]:
    """Every combination of the values of a grid, such as {"optim.lr": (1e-3, 2e-3), "train.seed": (0, 1)}, by name.

    Raises ValueError for a field that is not there, or a value that it cannot have.
    """
    made: dict[str, RunConfig] = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        plain = json.loads(config_to_json(config))
        for name, value in chosen.items():
            *groups, leaf = name.split(".")
            inside = plain
            for group in groups:
                inside = inside.setdefault(group, {})
            inside[leaf] = value
        made[",".join(f"{name.rpartition('.')[2]}={value}" for name, value in chosen.items())] = from_dict(
            RunConfig, plain
        )
    return made


def sweep_on_ray(
    runs: Mapping[str, RunConfig], folder: str | Path, *, data: str | Path | None = None, restarts: int = 3
) -> dict[str, dict[str, Any]]:
    """Train every run in a process of its own, as many at once as the cluster has CPUs or GPUs for.

    A trial is the run folder `folder`/NAME: a finished one is skipped, a stopped one goes on. The rows of the table,
    also in `folder`/table.json: step, losses, seconds, whether it was skipped, and what went wrong.
    """
    folder = Path(folder).absolute()
    skipped = {name for name, config in runs.items() if saved_step(folder / name) == config.train.steps}
    ray, waiting = needed(), dict[str, Any]()
    for name, config in runs.items():
        if name not in skipped:
            alone = replace(config, parallel=replace(config.parallel, ranks=1))
            gpus = int(config.train.device.startswith("cuda"))
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=restarts)(work)
            waiting[name] = task.remote(place(alone, folder / name, data))
    faults = {name: fault_of(ray, task) for name, task in waiting.items()}
    table = {name: row(folder / name, name in skipped, faults.get(name, "")) for name in runs}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "table.json", json.dumps(table, indent=2).encode())
    return table


def fault_of(ray: Any, task: Any) -> str:
    """The last line of what a trial ended with, or nothing. One bad trial does not end the others."""
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]
    return ""


def row(folder: Path, skipped: bool, fault: str) -> dict[str, Any]:
    """A trial as its metrics tell it."""
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    scores = [record["validation"]["loss"] for record in records if "validation" in record]
    return {
        "step": saved_step(folder),
        "loss": records[-1]["loss"] if records else None,
        "held-out loss": scores[-1] if scores else None,
        "seconds": records[-1]["seconds"] if records else None,
        "skipped": skipped,
        "fault": fault,
    }
