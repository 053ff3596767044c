"""Losses land in the right position, context and unit."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling.evals import bits_per_byte, perplexity, window_losses
from tests.evals.small_models import VOCAB, Counter, model, text


def test_positions_and_units_by_hand() -> None:
    """A model that predicts target t with loss t / 100."""
    windows = torch.zeros(3, 41, dtype=torch.long)
    found = perplexity(Counter(), windows, buckets=4, contexts=(8, 16, 32), scored=4, bytes_per_token=2.0)
    assert found.total.n == 3 * 40
    assert found.total.nats == pytest.approx(0.205, rel=1e-6)
    assert found.total.bits_per_byte == pytest.approx(0.205 / math.log(2) / 2, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(0.205), rel=1e-6)
    assert [(p.start, p.end, p.n) for p in found.by_position] == [(0, 10, 30), (10, 20, 30), (20, 30, 30), (30, 40, 30)]
    assert [p.nats for p in found.by_position] == pytest.approx([0.055, 0.155, 0.255, 0.355], rel=1e-5)
    # with c tokens before the first scored one, the scored targets are numbers c ... c + 3
    assert [c.nats for c in found.by_context] == pytest.approx([(c + 1.5) / 100 for c in (8, 16, 32)], rel=1e-5)
    assert [c.n for c in found.by_context] == [12, 12, 12]


def test_agrees_with_cross_entropy_of_the_model() -> None:
    reader, windows = model("transformer"), text(33, rows=5)
    with torch.no_grad():
        logits = reader(windows[:, :-1], learn=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    found = perplexity(reader, windows, rows=2)
    assert found.total.nats == pytest.approx(float(expected), rel=1e-6)
    assert (found.windows, found.length, found.total.n) == (5, 32, 160)


def test_learning_inside_a_window_counts_only_if_asked() -> None:
    reader, windows = model(), text(65, rows=2)
    still = window_losses(model(inner_lr=0.0), windows)
    assert torch.equal(window_losses(reader, windows, learn=False), still)
    learned = window_losses(reader, windows, learn=True)
    assert torch.allclose(learned[:, :16], still[:, :16], rtol=1e-6)  # nothing is written before token 17 arrives
    assert not torch.allclose(learned[:, 17:], still[:, 17:], rtol=1e-6)


def test_to_dict_is_json() -> None:
    import json

    found = perplexity(model("transformer"), text(33, rows=2), contexts=(8,), scored=8)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["total"]["nats"] == found.total.nats
    assert again["by_context"][0]["context"] == 8


def test_wrong_windows() -> None:
    with pytest.raises(ValueError, match="context=40 with scored=8 does not fit into windows of 33"):
        perplexity(Counter(), torch.zeros(2, 33, dtype=torch.long), contexts=(40,), scored=8)
    with pytest.raises(ValueError, match=r"shape \(33,\)"):
        perplexity(Counter(), torch.zeros(33, dtype=torch.long))


def test_uniform_model_has_the_entropy_of_the_vocabulary() -> None:
    flat = model("transformer")
    torch.nn.init.zeros_(flat.head.weight)
    found = perplexity(flat, text(17, rows=2))
    assert found.total.bits_per_byte == pytest.approx(math.log2(VOCAB), rel=1e-6)
    assert bits_per_byte(math.log(2)) == 1.0
