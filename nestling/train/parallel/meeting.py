"""How the processes of a run find one another in a store that earlier attempts of the same job have used too.

All restarts of torchrun may share one store (torch 2.13), where the address of a rank lies that was killed. And agents
on several hosts count their restarts apart, so that the count names no attempt. So every process announces itself by a
name of its own, and rank 0 calls the roll until all whom it names have answered.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PAUSE = 0.05  # seconds between two looks


def meet(backend: str, limit: timedelta) -> None:
    """Form the process group that the environment names (torchrun's variables). Raises TimeoutError."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
    while isinstance(store, dist.PrefixStore):  # some releases of torch put the count of restarts before every key
        store = store.underlying_store
    mine = assembled(store, rank, size, limit)
    dist.init_process_group(backend, store=mine, rank=rank, world_size=size, timeout=limit)


def assembled(store: Any, rank: int, size: int, limit: timedelta) -> dist.PrefixStore:
    """A part of the store for these very processes, the same for all of them. Raises TimeoutError."""
    me, until = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    store.set(f"here/{rank}", me)
    said: dict[str, Any] = {"name": "", "ranks": []}
    while True:
        if rank == 0:
            present = [store.get(key).decode() for key in keys("here", size) if store.check([key])]
            if len(present) == size and present != said["ranks"]:
                said = {"name": uuid.uuid4().hex, "ranks": present}
                store.set("roll", json.dumps(said))
        elif store.check(["roll"]):
            said = json.loads(store.get("roll"))
        if said["ranks"] and said["ranks"][rank] == me:
            store.set(f"{said['name']}/{rank}", "answered")
            if store.check(keys(said["name"], size)):
                return dist.PrefixStore(said["name"], store)
        if time.monotonic() > until:
            raise TimeoutError(
                f"rank {rank} of {size} met no others within {limit.total_seconds():g} s; "
                "look at the logs of the other hosts, or use a longer parallel.timeout"
            )
        time.sleep(PAUSE)


def keys(begin: str, size: int) -> list[str]:
    return [f"{begin}/{rank}" for rank in range(size)]
