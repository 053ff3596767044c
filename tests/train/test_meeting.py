"""How ranks meet: apart from earlier attempts, whatever these have left in the store."""

import json
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from nestling.train.parallel.meeting import assembled

LIMIT = timedelta(seconds=20)


def met(store: dist.Store, ranks: dict[int, dist.Store | None], size: int) -> None:
    """Let these ranks meet, each in a thread; what they get goes into `ranks`."""

    def one(rank: int) -> None:
        ranks[rank] = assembled(store, rank, size, LIMIT)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in list(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ranks_share_a_part_of_the_store_and_every_attempt_has_its_own() -> None:
    store = dist.HashStore()
    attempts = []
    for attempt in range(3):
        found: dict[int, dist.Store | None] = dict.fromkeys(range(3))
        met(store, found, 3)
        assert not any(part.check(["address"]) for part in found.values())
        found[0].set("address", str(attempt))
        attempts.append(found)
    assert [[part.get("address") for part in found.values()] for found in attempts] == [
        [str(attempt).encode()] * 3 for attempt in range(3)
    ]


def test_a_rank_that_died_after_its_announcement_is_waited_for_until_another_takes_its_place() -> None:
    store = dist.HashStore()
    store.set("here/1", "a rank that was killed")
    store.set("roll", json.dumps({"name": "old", "ranks": ["a rank that was killed", "a rank that was killed"]}))
    store.set("old/0", "answered")
    store.set("old/1", "answered")
    found: dict[int, dist.Store | None] = {0: None}
    first = threading.Thread(target=met, args=(store, found, 2))
    first.start()
    first.join(0.3)
    assert first.is_alive()  # rank 0 has called the one that was killed, who does not answer
    other: dict[int, dist.Store | None] = {1: None}
    met(store, other, 2)
    first.join()
    found[0].set("address", "here")
    assert other[1].get("address") == b"here"


def test_who_is_missing_is_an_error_with_a_remedy() -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 of 2 met no others within 0.2 s; .* parallel.timeout"):
        assembled(dist.HashStore(), 0, 2, timedelta(seconds=0.2))
