"""Run by test_sharded.py: two processes train FSDP2 models, and each the same model alone; the differences are printed.

python processes.py RANK FILE
"""

import copy
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from nestling import optim
from nestling.ops import dispatch

STEPS, BATCH = 10, 64


def both(make):
    """Matrices by `make`, vectors by AdamW."""

    def levels(model, period=1):
        parts = [[p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False)]
        return optim.MultiLevel({"slow": (make(parts[0]), period), "fast": (torch.optim.AdamW(parts[1]), 1)})

    return levels


MAKE = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "Momentum": lambda model: optim.Momentum(model.parameters(), 0.02, nesterov=True, weight_decay=0.01),
    "Preconditioned, diagonal": lambda model: optim.PreconditionedMomentum(model.parameters(), 2e-3),
    "DeltaMomentum, scalar": lambda model: optim.DeltaMomentum(model.parameters(), 0.02, erase="scalar"),
    "MultiLevel": lambda model: both(lambda params: optim.Momentum(params, 0.05))(model, 3),
    "DGD": lambda model: optim.DGD(model, 0.5),
    "DGD, first order": lambda model: optim.DGD(model, 0.5, exact=False, weight_decay=0.01),
    "Muon": both(lambda params: optim.Muon(params, 0.01, ns_dtype="float32")),
    "M3": both(lambda params: optim.M3(params, 0.01, slow=[(3, 0.9, 0.5)], ns_dtype="float32")),
}


def network():
    """Square matrices or nearly, so that gradients of 64 samples have full rank; 7 rows do not divide by two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8))


def step(model, optimizer, number, rows):
    made = torch.Generator().manual_seed(number)
    x, y = torch.randn(BATCH, 8, generator=made)[rows], torch.randn(BATCH, 8, generator=made)[rows]
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()


def spread(rank, mesh):
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


@torch.no_grad()
def difference(model, alone):
    """The largest difference of a parameter, relative to its largest entry."""
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((p.full_tensor() - q).abs().max() / q.abs().max()) for p, q in pairs)


def train_alone(make):
    alone = network()
    optimizer = make(alone)
    for number in range(STEPS):
        step(alone, optimizer, number, slice(None))
    return alone


def compare(make, alone, rank, mesh):
    model, rows = spread(rank, mesh)
    optimizer = make(model)
    for number in range(STEPS):
        step(model, optimizer, number, rows)
    moved = difference(model, network())
    return {"difference": difference(model, alone), "moved": moved}


class Text(nn.Module):
    """An embedding, a grouped convolution, and a layer of one row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.out = nn.Linear(8, 1)

    def forward(self, tokens):
        return self.out(torch.tanh(self.mix(self.embedding(tokens).mT)).mT)[..., 0]


def delta_text(model, rows):
    """Embedding and convolution under DGD."""
    made, optimizer = torch.Generator().manual_seed(0), optim.DGD(model, 0.5)
    tokens, goal = torch.randint(11, (8, 5), generator=made), torch.randn(8, 5, generator=made)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(model(tokens[rows]), goal[rows]).backward()
        optimizer.step()
    return model


def compare_text(alone, rank, mesh):
    model = delta_text(fully_shard(Text(), mesh=mesh), slice(4 * rank, 4 * rank + 4))
    return {"difference": difference(model, alone), "moved": difference(model, Text())}


def refusal():
    """What DGD says of a model that is not spread."""
    model = network()
    try:
        step(model, MAKE["DGD"](model), 0, slice(None))
    except ValueError as error:
        return str(error)
    return ""


def factored(rank, mesh):
    """The shapes of what this process orthogonalises in one step of Muon on three matrices."""
    model, rows = spread(rank, mesh)
    optimizer, seen, real = MAKE["Muon"](model), [], dispatch.newton_schulz

    def watched(stack, *args, **options):
        seen.append(list(stack.shape))
        return real(stack, *args, **options)

    dispatch.newton_schulz = watched
    step(model, optimizer, 0, rows)
    dispatch.newton_schulz = real
    return seen


def resumed(rank, mesh):
    """Ten steps, and five steps, a checkpoint of the sharded state, and five more."""
    model, rows = spread(rank, mesh)
    optimizer = MAKE["M3"](model)
    for number in range(5):
        step(model, optimizer, number, rows)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    other, _ = spread(rank, mesh)
    restored = MAKE["M3"](other)
    other.load_state_dict(saved[0])
    set_optimizer_state_dict(other, restored, saved[1])
    for trained, by in ((model, optimizer), (other, restored)):
        for number in range(5, STEPS):
            step(trained, by, number, rows)
    return all(
        torch.equal(p.full_tensor(), q.full_tensor())
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def main() -> None:
    rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
    torch.set_num_threads(1)
    alone = {name: train_alone(make) for name, make in MAKE.items()}
    text = delta_text(Text(), slice(None))
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    mesh = init_device_mesh("cpu", (2,))
    results = {name: compare(make, alone[name], rank, mesh) for name, make in MAKE.items()}
    results |= {
        "DGD, other layers": compare_text(text, rank, mesh),
        "factored": factored(rank, mesh),
        "refusal": refusal(),
    }
    print(json.dumps({**results, "resumed": resumed(rank, mesh)}), flush=True)
    leave(rank, store)


def leave(rank, store) -> None:
    """End without shutting gloo down, once both are done: its threads sometimes abort a process that does (torch 2.13,
    "terminate called without an active exception", after all results were printed)."""
    store.set(f"done {rank}", "")
    store.wait(["done 0", "done 1"])
    os._exit(0)


if __name__ == "__main__":
    main()
