"""A document in stretches, the state handed on, is the document: loss, gradients and final state."""

from dataclasses import replace

import pytest
import torch

from nestling.core.state import flatten
from nestling.models import build, config_of
from nestling.train.parallel.ranks import Ranks
from nestling.train.parallel.sequence import check_sequence


@pytest.mark.parametrize("name", ["hope", "hope-attention"])
def test_stretches_of_whole_segments_have_the_gradients_of_the_whole(name: str) -> None:
    torch.manual_seed(0)
    options = {"periods": (16.0, 32.0), "chunk_size": 8, "depth": 2, "dim": 16, "heads": 2}
    model = build(name, **options).double()
    tokens = torch.randint(256, (2, 193))
    loss, whole = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    wanted = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    state, parts = None, []
    for start in range(0, 192, 48):
        part, state = model.loss(tokens[:, start : start + 48], tokens[:, start + 1 : start + 49], state=state)
        (part / 4).backward()
        parts.append(float(part.detach()))
    assert sum(parts) / 4 == pytest.approx(float(loss.detach()), rel=1e-12)
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=1e-12)
    one, other = flatten(state.tree)[0], flatten(whole.tree)[0]
    for key in one:
        if ".mixers" not in key:
            torch.testing.assert_close(one[key], other[key], rtol=1e-8, atol=1e-10)


def test_who_reads_what() -> None:
    ranks = [Ranks(rank, 6, sequence=3) for rank in range(6)]
    assert [r.column for r in ranks] == [0, 1, 2, 0, 1, 2]
    assert [r.after for r in ranks] == [1, 2, 0, 4, 5, 3] and [r.before for r in ranks] == [2, 0, 1, 5, 3, 4]
    assert [list(r.rows(4)) for r in ranks] == 3 * [[0, 1]] + 3 * [[2, 3]]


def test_who_reads_what_where_groups_split_matrices() -> None:
    ranks = [Ranks(rank, 8, sequence=2, tensor=2) for rank in range(8)]
    assert [r.part for r in ranks] == 4 * [0, 1] and [r.column for r in ranks] == 2 * [0, 0, 1, 1]
    assert [r.after for r in ranks] == [2, 3, 0, 1, 6, 7, 4, 5] == [r.before for r in ranks]
    assert [list(r.rows(4)) for r in ranks] == 4 * [[0, 1]] + 4 * [[2, 3]]
    assert [list(r.share(8)) for r in ranks] == [pair for i in range(4) for pair in 2 * [[2 * i, 2 * i + 1]]]
    assert [r.speaks for r in ranks] == 2 * [True, False, False, False]


def test_models_whose_gradient_would_cross_the_border_are_refused() -> None:
    config = config_of("hope", periods=(16.0, 32.0))
    check_sequence(config, 96, 3)
    with pytest.raises(ValueError, match="train.length=100 does not divide into 2 .* of 16 tokens; use .* example 96"):
        check_sequence(config, 100, 2)
    for changed in ({"outer": "sequence"}, {"bptt": 1}, {"periods": (float("inf"),)}):
        with pytest.raises(ValueError, match="needs a model whose gradient ends at each segment"):
            check_sequence(replace(config, **changed), 96, 2)
