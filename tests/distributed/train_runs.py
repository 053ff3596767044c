"""Run by test_train.py: the same small runs by one, two and four processes; what differs is printed as JSON.

python -m tests.distributed.train_runs FOLDER
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nestling.core.spread import whole
from nestling.core.state import flatten
from nestling.train import RunConfig, prepare
from nestling.train.checkpoint import DamagedCheckpoint, read_checkpoint
from nestling.train.parallel.ranks import joined
from nestling.train.run import load_run, run_config
from nestling.train.run_folder import read_any
from nestling.train.sharded import ShardedCheckpoints, load_sharded
from nestling.train.trainer import Trainer
from tests.distributed.programs import ROWS, STEPS, begun, difference, quiet_run, saved, together
from tests.train.small_runs import small


def config_of(matrices: str = "adamw", **parallel: Any) -> RunConfig:
    """Ten steps of a small Hope whose levels write several times, the third step's rows in many documents."""
    made = small("hope", steps=STEPS, rows=ROWS, checkpoint_every=5, calibrate_every=0, eval_every=0)
    made = replace(made, model=replace(made.model, depth=1))
    made = replace(made, data=replace(made.data, text="texts", validation="moby_dick"))
    optim = replace(made.optim, matrices=matrices, ns_dtype="float32")
    return replace(made, optim=optim, parallel=replace(made.parallel, **parallel))


def stretched() -> RunConfig:
    """The same with steps of twice the length: two stretches of whole segments."""
    made = config_of()
    return replace(made, train=replace(made.train, length=64, stream_length=256))


def bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything a trainer holds, whole, by name; of the state the rows of this rank."""
    held = {f"model.{n}": whole(p) for n, p in trainer.model.state_dict().items()}
    for i, state in enumerate(trainer.optimizer.state_dict()["state"].values()):
        for key, x in state.items():
            held[f"optimizer.{i}.{key}"] = whole(torch.as_tensor(x))
    if trainer.state is not None:
        held |= {f"state.{name}": x for name, x in flatten(trainer.state.tree)[0].items()}
    return {name: x.clone() for name, x in held.items()}


def trainer_of(data: Path, **parallel: Any) -> Trainer:
    config = config_of(**parallel)
    ready = prepare(config, data=data)
    return Trainer(ready.model, ready.stream, config, joined())


def write_in_background(rank: int, folder: Path, data: Path) -> None:
    """Two ranks: five steps, a checkpoint, and five more while it is written; what they held is put down."""
    trainer = trainer_of(data)
    writer = ShardedCheckpoints(folder, trainer.ranks, {}, trainer.config)
    for step in range(1, STEPS + 1):
        trainer.next_step()
        if step == 5:
            torch.save(bits(trainer), folder / f"held-2-{rank}.pt")
            writer.save(trainer)
    writer.wait()
    assert rank or [path.name for path in folder.glob("step-*")] == ["step-00000005"]
    torch.save(bits(trainer), folder / f"last-2-{rank}.pt")


def read_on_others(rank: int, folder: Path, data: Path) -> None:
    """Any number of ranks: load the checkpoint, and put down what each then holds."""
    trainer = trainer_of(data)
    load_sharded(folder / "step-00000005", trainer)
    assert trainer.step == 5 and trainer.stream.position == 5 * trainer.config.train.length
    torch.save(bits(trainer), folder / f"held-{trainer.ranks.size}-{rank}.pt")


def others_hold(held: dict[str, torch.Tensor], folder: Path, size: int) -> bool:
    """Whether any of `size` ranks holds other bits than `held`; of a state each has its rows."""
    for rank in range(size):
        found = torch.load(folder / f"held-{size}-{rank}.pt")
        rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
        expected = {name: x[rows] if name.startswith("state.") else x for name, x in held.items()}
        if found.keys() != expected.keys() or not all(torch.equal(x, found[name]) for name, x in expected.items()):
            return True
    return False


def all_rows(folder: Path) -> dict[str, torch.Tensor]:
    """What two ranks hold together."""
    held = [torch.load(folder / f"held-2-{rank}.pt") for rank in (0, 1)]
    return {n: torch.cat([h[n] for h in held]) if n.startswith("state.") else x for n, x in held[0].items()}


def background(folder: Path, data: Path) -> dict[str, Any]:
    """A checkpoint of two ranks, written while they train on, read by one and by four."""
    together(2, folder, lambda rank: write_in_background(rank, folder, data))
    read_on_others(0, folder, data)
    together(4, folder, lambda rank: read_on_others(rank, folder, data))
    last, alone = torch.load(folder / "last-2-0.pt"), trainer_of(data)
    for _ in range(STEPS):
        alone.next_step()
    weights = {name: x for name, x in bits(alone).items() if name.startswith("model.")}
    apart = max(float((last[n] - x).abs().max() / x.abs().max().clamp_min(1e-3)) for n, x in weights.items())
    return {
        "differs": any(others_hold(all_rows(folder), folder, size) for size in (1, 2, 4)),
        "weights": apart,
        "damaged": damaged(folder / "step-00000005"),
    }


def load_from_one(rank: int, folder: Path, data: Path, checkpoint: Path) -> None:
    """Any number of ranks: take over a checkpoint that one process wrote, and put down what each then holds."""
    trainer = trainer_of(data)
    trainer.load(read_checkpoint(checkpoint))
    torch.save(bits(trainer), folder / f"held-{trainer.ranks.size}-{rank}.pt")


def from_one(folder: Path, data: Path, one: Path) -> dict[str, Any]:
    """The checkpoint that one process wrote after five steps, read by two and by four, which go on to the end."""
    checkpoint, found = saved(one, STEPS // 2), dict[str, Any]()
    load_from_one(0, folder, data, checkpoint)
    held, differs = torch.load(folder / "held-1-0.pt"), False
    for size in (2, 4):
        together(size, folder, lambda rank: load_from_one(rank, folder, data, checkpoint))
        differs |= others_hold(held, folder, size)
        spread = folder / f"spread-{size}"
        shutil.copytree(one, spread)
        shutil.rmtree(saved(spread, STEPS))
        together(size, folder, lambda rank: quiet_run(config_of(), spread, data, resume=True))  # noqa: B023
        found[f"on {size}"] = difference(spread, one)
    return {"differs": differs, **found}


def goes_on(done: Path, data: Path) -> bool:
    """Whether two ranks that go on from the middle of a run of theirs end with the same bits."""
    again, config = done.with_name(f"{done.name}-again"), run_config(done)
    shutil.copytree(done, again)
    shutil.rmtree(saved(again, STEPS))
    together(2, data, lambda rank: quiet_run(config, again, data, resume=True))
    one, other = (load_run(path)[0].state_dict() for path in (done, again))
    return all(torch.equal(one[name], other[name]) for name in one)


def damaged(checkpoint: Path) -> str:
    """What is said of a checkpoint that is cut short."""
    with open(checkpoint / "__1_0.distcp", "r+b") as file:
        file.truncate(100)
    try:
        read_any(checkpoint)
    except DamagedCheckpoint as error:
        return str(error)
    return ""


def main() -> None:
    folder = begun()
    (folder / "background").mkdir()
    found: dict[str, Any] = {"background": background(folder / "background", folder)}
    cases = {
        "adamw": (config_of(), 4, {"shard": 2}),
        "muon": (config_of("muon"), 2, {"accumulate": 2, "recompute": True}),
        "m3": (config_of("m3"), 4, {"shard": 2}),
        "dgd": (config_of("dgd"), 2, {"accumulate": 2}),
        "sequence": (stretched(), 4, {"sequence": 2, "accumulate": 2}),
    }
    for name, (config, size, parallel) in cases.items():
        quiet_run(config, folder / f"{name}-1", folder)
        spread = replace(config, parallel=replace(config.parallel, **parallel))
        together(size, folder, lambda rank: quiet_run(spread, folder / f"{name}-{size}", folder))  # noqa: B023
        found[name] = difference(folder / f"{name}-{size}", folder / f"{name}-1")
    found["dgd"]["resumed"] = float(not goes_on(folder / "dgd-2", folder))
    (folder / "from-one").mkdir()
    found["from one"] = from_one(folder / "from-one", folder, folder / "adamw-1")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
