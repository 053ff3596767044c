"""Run by test_tensor.py: small runs whose ranks split the matrices, and one process; what differs is printed as JSON.

python -m tests.distributed.tensor_runs FOLDER
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.core.spread import local, whole
from nestling.core.state import flatten
from nestling.models.split import split_of_state
from nestling.train import RunConfig, prepare
from nestling.train.checkpoint import read_checkpoint
from nestling.train.parallel.ranks import joined
from nestling.train.parallel.splits import splits_of
from nestling.train.run_folder import any_weights
from nestling.train.sharded import load_sharded
from nestling.train.trainer import Trainer
from tests.distributed.programs import ROWS, begun, difference, quiet_run, saved, together
from tests.train.small_runs import small


@dataclass(frozen=True)
class Case:
    """A run of `size` ranks."""

    name: str
    size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    matrices: str = "adamw"
    dtype: torch.dtype = torch.float64
    steps: int = 6

    @property
    def config(self) -> RunConfig:
        """A few steps of one block, whose levels write several times if it has any; rows end documents in between."""
        length = 64 if "sequence" in self.parallel else 24
        steps = {"steps": self.steps, "checkpoint_every": self.steps // 2}
        made = small(self.name, rows=ROWS, length=length, stream_length=5 * length, **steps)
        return replace(
            made,
            model=replace(made.model, depth=1, options={"hidden": 40, "inner_kappa": 0.0}),
            data=replace(made.data, text="texts", validation="moby_dick"),
            optim=replace(made.optim, matrices=self.matrices, ns_dtype="float32"),
            parallel=replace(made.parallel, **self.parallel),
        )


CASES = {
    "transformer": Case("transformer", 2, {"tensor": 2, "accumulate": 2}, dtype=torch.float32),
    "levels": Case("hope-attention", 2, {"tensor": 2, "recompute": True}, dtype=torch.float32),
    "two dimensions": Case("hope-attention", 4, {"tensor": 2, "shard": 2, "accumulate": 2}),
    "muon": Case("hope", 2, {"tensor": 2}, matrices="muon"),
    "m3": Case("hope-attention", 4, {"tensor": 2, "sequence": 2, "accumulate": 2}, matrices="m3", steps=10),
}
READERS = {  # of the checkpoint in the middle of "two dimensions"
    "one": Case("hope-attention", 1),
    "four": Case("hope-attention", 4),
    "two copies": Case("hope-attention", 4, {"tensor": 2, "shard": 1}),
}


def compare(name: str, folder: Path) -> dict[str, float]:
    """A case, and the same on one process."""
    case = CASES[name]
    torch.set_default_dtype(case.dtype)
    alone = replace(case.config.parallel, tensor=1, shard=0, sequence=1, accumulate=1, recompute=False)
    quiet_run(replace(case.config, parallel=alone), folder / f"{name}-1", folder)
    together(case.size, folder, lambda rank: quiet_run(case.config, folder / f"{name}-n", folder))
    return difference(folder / f"{name}-n", folder / f"{name}-1", case.steps)


def trainer_of(data: Path, case: Case) -> Trainer:
    ready = prepare(case.config, data=data)
    return Trainer(ready.model, ready.stream, case.config, joined(tensor=case.config.parallel.tensor))


def held(trainer: Trainer) -> dict[str, Tensor]:
    """What a trainer holds: weights and moments whole, in the order of the model; buffers; of a state what is here."""
    parts, found = trainer.ranks.tensor, dict[str, Tensor]()
    for name, p in trainer.model.named_parameters():
        for key, x in {"weight": p, **trainer.optimizer.state[p]}.items():
            x, split = whole(torch.as_tensor(x).detach()), trainer.layout.splits.get(name)
            if split is not None and x.dim() > 1:  # rows lie sorted by ranks
                apart = x.unflatten(split.dim, (parts, split.blocks, -1)).transpose(split.dim, split.dim + 1)
                x = apart.flatten(split.dim, split.dim + 2)
            found[f"{name} {key}"] = x.clone()
    found |= {name: x.clone() for name, x in trainer.model.named_buffers()}
    assert trainer.state is not None
    return found | {f"state.{name}": x for name, x in flatten(trainer.state.tree)[0].items()}


def read_and_go_on(rank: int, folder: Path, data: Path, checkpoint: Path, case: Case) -> None:
    """Put down what this rank holds when it has read a checkpoint, and all weights at the end of the run."""
    trainer = trainer_of(data, case)
    if (checkpoint / "trees.json").exists():
        load_sharded(checkpoint, trainer)
    else:
        trainer.load(read_checkpoint(checkpoint))
    assert trainer.step == case.steps // 2
    at_once, ranks = held(trainer), trainer.ranks
    while trainer.step < case.steps:
        trainer.next_step()
    there = {"rows": list(ranks.rows(ROWS)), "part": ranks.part, "held": at_once, "last": held(trainer)}
    torch.save(there, folder / f"{rank}.pt")
    if ranks.tensor > 1:
        (folder / f"{rank}.json").write_text(json.dumps(bytes_of(trainer)))


def read(folder: Path, data: Path, checkpoint: Path, case: Case) -> list[dict[str, Any]]:
    """What each rank has put down."""
    folder.mkdir()
    if case.size == 1:
        read_and_go_on(0, folder, data, checkpoint, case)
    else:
        together(case.size, folder, lambda rank: read_and_go_on(rank, folder, data, checkpoint, case))
    return [torch.load(folder / f"{rank}.pt") for rank in range(case.size)]


def differs(one: dict[str, Tensor], there: dict[str, Any], case: Case, model: Any) -> bool:
    """Whether a rank holds other bits than one process; of a state it has its part of its rows, if they have any."""
    parts, found = case.config.parallel.tensor, there["held"]
    states = [name.removeprefix("state.") for name in one if name.startswith("state.")]
    split = split_of_state(states, splits_of(model, parts)) if parts > 1 else {}
    for name, x in one.items():
        key = name.removeprefix("state.")
        x = x if key == name else x[there["rows"]]
        x = split[key].cut(x, there["part"], parts) if key in split else x
        nothing = key != name and name not in found and not x.any()  # of what they wait to write
        if not nothing and not torch.equal(x, found[name]):
            return True
    return not found.keys() <= one.keys()


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """How far weights are apart, relative to the largest of each."""
    return max(float((ours[n] - x).abs().max() / x.abs().max().clamp_min(1e-3)) for n, x in theirs.items())


def resumed(folder: Path, data: Path) -> dict[str, Any]:
    """Checkpoints in the middle of a run, read by others, who go on to the end of it."""
    folder.mkdir()
    many, one = ([saved(data / f"two dimensions-{n}", step) for step in (3, 6)] for n in ("n", "1"))
    found: dict[str, Any] = {"middle": apart(any_weights(many[0]), any_weights(one[0]))}
    ends = {"adamw": any_weights(one[1]), "m3": any_weights(saved(data / "m3-1", 10))}
    model = prepare(READERS["one"].config, data=data).model
    first: dict[str, dict[str, Tensor]] = {}
    split = Case("hope-attention", 2, {"tensor": 2})
    stretches = Case("hope-attention", 1, {"sequence": 1}, matrices="m3", steps=CASES["m3"].steps)
    pairs = [(label, many[0], case) for label, case in READERS.items()]
    pairs += [("of one", one[0], READERS["one"]), ("of one, split", one[0], split)]
    pairs += [("stretches", saved(data / "m3-n", 5), stretches)]
    for label, checkpoint, case in pairs:
        ranks = read(folder / label, data, checkpoint, case)
        reference = first.setdefault(str(checkpoint), ranks[0]["held"])  # what one process holds
        last = {n.removesuffix(" weight"): x for n, x in ranks[0]["last"].items() if n.endswith(" weight")}
        found[label] = {
            "differs": any(differs(reference, there, case, model) for there in ranks),
            "end": apart(last, {name: ends[case.matrices][name] for name in last}),
        }
        if label == "of one":
            fast = {n.removeprefix("state."): x for n, x in ranks[0]["last"].items() if n.startswith("state.fast.")}
            found["fast"] = sum(fast[name].nbytes for name in split_of_state(fast, splits_of(model, 2)))
    found["bytes"] = [json.loads((folder / "of one, split" / f"{rank}.json").read_text()) for rank in (0, 1)]
    return found


def bytes_of(trainer: Trainer) -> dict[str, Any]:
    """Bytes of every parameter: all of it, here between two steps, here inside of one, and of a moment of it here; of
    fast weights and what levels wait to write: what is split, and the rest."""
    named, splits = dict(trainer.model.named_parameters()), trainer.layout.splits
    moments = {name: trainer.optimizer.state[p]["exp_avg"] for name, p in named.items()}
    sizes = {name: [p.numel() * p.itemsize, local(p).nbytes] for name, p in named.items()}
    with trainer.layout.gathered():
        for name, p in trainer.model.named_parameters():
            sizes[name] += [local(p).nbytes, local(moments[name]).nbytes]
    assert trainer.state is not None
    fast = {n: x for n, x in flatten(trainer.state.tree)[0].items() if n.startswith("fast.")}
    split = split_of_state(fast, splits)
    wide = sum(x.nbytes for n, x in fast.items() if n in split)
    return {"split": list(splits), "sizes": sizes, "fast": [wide, sum(x.nbytes for x in fast.values()) - wide]}


def main() -> None:
    folder = begun(torch.float32)
    found: dict[str, Any] = {name: compare(name, folder) for name in CASES}
    torch.set_default_dtype(torch.float64)
    found["resumed"] = resumed(folder / "resumed", folder)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
