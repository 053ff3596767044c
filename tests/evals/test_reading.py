"""Reading: every token is predicted before it is learned; what is forgotten is measured without the context."""

import json

import pytest
import torch
from torch.nn import functional as F

from nestling.evals import domain_loss, forgetting, gain_percent, read_text, token_losses
from tests.evals.small_models import model, text


@pytest.mark.parametrize("name", ["transformer", "hope-attention", "hope"])
def test_the_size_of_calls_changes_nothing(name: str) -> None:
    reader, tokens = model(name), text(100)
    whole = read_text(reader, tokens, call_size=1000)
    parts = read_text(reader, tokens, call_size=17)
    assert whole.losses.shape == (1, 99)
    assert torch.allclose(whole.losses, parts.losses, rtol=1e-6)
    assert torch.equal(whole.state.writes, parts.state.writes)
    expected = token_losses(reader(tokens).logits[:, :-1], tokens[:, 1:])
    assert torch.allclose(whole.losses, expected, rtol=1e-6)


def test_each_token_is_predicted_before_it_is_learned() -> None:
    """Changing the last token changes no loss but its own."""
    reader, tokens = model(), text(98)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 40
    a, b = read_text(reader, tokens).losses, read_text(reader, other).losses
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_frozen_reading_writes_nothing() -> None:
    found = read_text(model(), text(80), learn=False)
    assert found.state.writes.tolist() == [[0, 0]]
    static = read_text(model(inner_lr=0.0), text(80), learn=True)
    assert torch.allclose(found.losses, static.losses, rtol=1e-6)
    assert gain_percent(static, found) == pytest.approx(0.0, abs=1e-4)


def test_reading_a_repeating_text_gains() -> None:
    reader, tokens = model(), text(600)
    learning, frozen = read_text(reader, tokens), read_text(reader, tokens, learn=False)
    assert gain_percent(learning, frozen) > 1.0
    halves = learning.nats(0.5) / frozen.nats(0.5)
    assert gain_percent(learning, frozen) == pytest.approx(100 * (1 - halves))


def test_writes_over_time() -> None:
    found = read_text(model(), text(97), call_size=32)
    assert [w.tokens for w in found.writes] == [32, 64, 96, 97]
    assert [w.counts for w in found.writes] == [(1, 0), (3, 1), (5, 2), (6, 3)]  # floor((n - 1) / period)
    norms = found.writes[-1].norms
    assert len(norms) == 4  # two levels in each of two blocks
    assert all(value > 0 for value in norms.values())


def test_curve_and_json() -> None:
    found = read_text(model(), text(65), call_size=32)
    curve = found.curve(4)
    assert [at for at, _ in curve] == [8, 24, 40, 56]
    assert curve[1][1] == pytest.approx(found.losses[0, 16:32].double().mean().item())
    assert found.nats() == pytest.approx(sum(nats for _, nats in curve) / 4)
    assert json.loads(json.dumps(found.to_dict(parts=4)))["nats_second_half"] == found.nats(0.5)
    assert len(found.curve(1000)) == 64


def test_a_state_without_writes_forgets_nothing() -> None:
    reader, windows = model(), text(25, rows=5, seed=9)
    frozen = read_text(reader, text(80), learn=False)
    assert forgetting(reader, frozen.state, windows, rows=2).percent == pytest.approx(0.0, abs=1e-9)
    still = model(inner_lr=0.0)
    assert forgetting(still, read_text(still, text(80)).state, windows).percent == pytest.approx(0.0, abs=1e-9)


def test_forgetting_uses_the_fast_weights_and_nothing_else() -> None:
    reader, windows = model(), text(25, rows=5, seed=9)
    state = read_text(reader, text(80)).state
    found = forgetting(reader, state, windows, rows=2)
    assert (found.windows, found.length) == (5, 24)
    learned = state.reset_context().select([0] * 5)
    with torch.no_grad():
        logits = reader(windows[:, :-1], learned, learn=False).logits
    after = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found.after == pytest.approx(float(after), rel=1e-6)
    assert found.before == pytest.approx(domain_loss(reader, windows), rel=1e-12)
    assert abs(found.percent) > 0.01
    assert found.percent == pytest.approx(100 * (found.after - found.before) / found.before)


def test_wrong_calls() -> None:
    reader = model()
    with pytest.raises(ValueError, match="need \\(B, T\\) with T >= 2"):
        read_text(reader, text(1))
    two = read_text(reader, text(40, rows=2)).state
    with pytest.raises(ValueError, match="state has 2 rows"):
        forgetting(reader, two, text(20, rows=2))
