"""What tensor parallelism splits, and what it refuses in one line. Runs on several ranks: tests/distributed."""

import re
from typing import Any

import pytest
import torch

from nestling.core.state import flatten
from nestling.models import build
from nestling.models.split import split_of_state
from nestling.train import OptimConfig, ParallelConfig, RunConfig
from nestling.train.compile import compile_blocks
from nestling.train.parallel.ranks import Ranks, joined
from nestling.train.parallel.splits import splits_of

SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "hidden": 40, "chunk_size": 8, "inner_kappa": 0.0}
LEVELS: dict[str, Any] = SMALL | {"periods": (16.0, 32.0)}
WIDTHS = "hidden={} does not divide into {} levels times 2 ranks; use a multiple of {}, for example 40"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transformer", SMALL | {"heads": 1}, "parallel.tensor=2: heads=1 do not divide among 2 ranks; use a multiple"),
        ("transformer", SMALL | {"hidden": 41}, WIDTHS.format(41, 1, 2)),
        ("hope", LEVELS | {"hidden": 42}, WIDTHS.format(42, 2, 4)),
        ("hope", LEVELS | {"inner_kappa": 100.0}, "cms 16 writes with inner_kappa, which joins hidden units"),
        (
            "hope",
            LEVELS | {"inner_erase": 0.5, "inner_learned": True},
            "cms 16 writes with inner_erase, inner_learned,",
        ),
        ("hope", LEVELS | {"inner_rule": "muon"}, 'cms 16 writes with inner_rule="muon"'),
        ("hope", LEVELS | {"inner_online": True}, "cms 16 writes with inner_online"),
        ("hope", LEVELS | {"bptt": 1}, "bptt=1 differentiates a write"),
    ],
)
def test_what_cannot_be_split_is_refused_with_a_remedy(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        splits_of(build(name, **options), 2)


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("parallel.tensor=3 does not divide the 1 ranks; use a divisor")):
        joined(tensor=3)


@pytest.mark.parametrize("name", ["transformer", "hope-attention", "hope", "gated-delta-net", "titans-mag"])
def test_a_vocabulary_that_does_not_divide_and_mixers_that_say_nothing_stay_whole(name: str) -> None:
    options = LEVELS if name.startswith("hope") else SMALL
    blocks = set(splits_of(build(name, **options, vocab_size=255), 2))
    assert set(splits_of(build(name, **options), 2)) - blocks == {"embedding.weight", "head.weight"}
    heads = {f"blocks.{i}.mixer.{x}.weight" for i in (0, 1) for x in ("qkv", "out")}
    assert blocks >= heads if name in ("transformer", "hope-attention") else not any("mixer" in n for n in blocks)
    assert sum(n.endswith("up.weight") for n in blocks) == 2 * len(build(name, **options).config.periods)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_of_a_state_all_is_split_that_grows_with_heads_or_hidden_units(rule: str) -> None:
    """Names are found by comparing with a model of half the hidden units: what is smaller there is split."""
    wide = LEVELS | {"inner_rule": rule, "dim": 32, "heads": 4, "hidden": 80}
    shapes: dict[int, dict[str, torch.Size]] = {}
    for hidden in (80, 40):
        model = build("hope-attention", **(wide | {"hidden": hidden}))
        _, state = model.loss(torch.arange(80).view(2, 40))
        shapes[hidden] = {name: x.shape for name, x in flatten(state.tree)[0].items()}
    split = split_of_state(shapes[80], splits_of(model, 2))
    grown = {n for n, shape in shapes[80].items() if n in shapes[40] and shapes[40][n] != shape}
    caches = {n for n in shapes[80] if n.startswith(("mixers", "segment.mixers")) and n.endswith((".k", ".v"))}
    assert grown and caches and grown <= set(split) and caches <= set(split)
    assert all(shapes[80][name][s.dim] % (2 * s.blocks) == 0 for name, s in split.items())


def test_what_reads_whole_maps_is_refused() -> None:
    parallel = ParallelConfig(tensor=2)
    with pytest.raises(ValueError, match="parallel.tensor=2 with optim.matrices=dgd, .* use adamw, muon or m3"):
        RunConfig(parallel=parallel, optim=OptimConfig(matrices="dgd"))
    with pytest.raises(ValueError, match="train.compile with parallel.tensor=2: .* leave out one of the two"):
        compile_blocks(build("transformer", **SMALL), RunConfig(parallel=parallel), Ranks(0, 2, tensor=2))
