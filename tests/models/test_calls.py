"""What models whose levels write promise beyond tests/contracts: clocks, pauses, documents, write counts."""

import math

import pytest
import torch

from nestling.models import State
from nestling.testing import assert_close
from tests.contracts.models import FAST, WRITING, made
from tests.models.tiny import has_graph, read, same_memory, text, tiny, written

LENGTH = 27


@pytest.fixture(params=WRITING)
def writer(request):
    return made(request.param)


def test_the_split_test_compares_something(writer):
    """Written weights and the logits of written and frozen models differ, or the test above would compare nothing."""
    tokens = text(2, LENGTH)
    logits, state = read(writer, tokens)
    frozen, _ = read(writer, tokens, learn=False)
    period = int(min(p for p in writer.config.periods))
    assert written(state) > 1e-3 or writer.config.continuum == "nested"
    assert_close(logits[:, :period], frozen[:, :period], "the first segment", 1e-12)
    assert float((logits[:, period:] - frozen[:, period:]).abs().max()) > 1e-3


def test_the_token_after_a_segment_is_read_with_the_new_weights():
    model = tiny(periods=(4,), inner_lr=0.5)
    tokens = text(1, 5)
    logits, state = read(model, tokens)
    frozen, _ = read(model, tokens, learn=False)
    assert state.writes.tolist() == [[1]]
    assert float((logits[:, 4] - frozen[:, 4]).abs().max()) > 1e-3


def test_pauses_in_learning_are_the_same_however_they_are_cut(writer):
    tokens = text(2, LENGTH)

    def run(calls):
        state, parts = None, []
        for a, b, learn in calls:
            logits, state = read(writer, tokens[:, a:b], state=state, learn=learn)
            parts.append(logits)
        return torch.cat(parts, 1), state

    logits, state = run([(0, 14, True), (14, 20, False), (20, LENGTH, True)])
    ours, end = run([(0, 3, True), (3, 14, True), (14, 15, False), (15, 20, False), (20, 21, True), (21, LENGTH, True)])
    assert_close(ours, logits, "logits", 1e-9)
    same_memory(end, state)


def test_without_learning_neither_clocks_nor_buffers_move(writer):
    tokens = text(2, 30)
    _, before = read(writer, tokens[:, :14])
    _, after = read(writer, tokens[:, 14:], state=before, learn=False)
    assert torch.equal(after.clocks, before.clocks)
    assert torch.equal(after.writes, before.writes)
    for path, level in before.tree.fast.items():
        for name, delta in level.delta.items():
            assert torch.equal(after.tree.fast[path].delta[name].to_dense(), delta.to_dense())
    assert after.tokens.tolist() == [30, 30]


@pytest.mark.parametrize("reset", ["never", "document"])
def test_a_new_document_forgets_what_its_policy_says(reset):
    model = tiny(**FAST, reset=reset)
    tokens, border = text(1, 20), 10
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, border] = True
    logits, state = read(model, tokens, new_document=starts)
    fresh, end = read(model, tokens[:, border:])
    if reset == "document":
        assert_close(logits[:, border:], fresh, "second document", 1e-9)
        assert_close(state.clocks, end.clocks, "clocks")
    else:
        assert float((logits[:, border:] - fresh).abs().max()) > 1e-3
        closed, _ = read(model, tokens[:, :border])
        alone, _ = read(model, tokens[:, border:], state=read(model, tokens[:, :border])[1].reset_context())
        assert_close(logits[:, border:], alone, "second document, memory kept", 1e-9)


def test_rows_that_forget_do_so_where_float64_is_the_default():
    """From a border in its first segment on a row writes at times of its own."""
    model, tokens = tiny(**FAST, reset="document"), text(2, 30)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, 2] = True
    expected, _ = read(model, tokens, new_document=starts)
    torch.set_default_dtype(torch.float64)
    try:
        logits, state = read(model, tokens, new_document=starts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(logits, expected, "logits", 1e-12)
    assert {level.norm.dtype for level in state.tree.fast.values()} == {torch.float32}


def test_a_document_border_closes_the_segment_with_the_targets_that_are_known():
    """Row of 6 + 6 tokens, period 4: writes after 4 and, 2 + 2 tokens later, across the border, after 8."""
    model = tiny(periods=(4,), inner_lr=0.05)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, 6] = True
    _, state = read(model, text(1, 12), new_document=starts)
    assert state.writes.tolist() == [[2]]
    _, before = read(model, text(1, 8), new_document=starts[:, :8])
    level = next(iter(before.tree.fast.values()))
    assert (level.clock.item(), level.targets.item()) == (2, 1)  # 2 tokens closed, only the first has a target


def test_reset_context_keeps_what_was_learned(writer):
    tokens = text(2, 40)
    _, state = read(writer, tokens[:, :18])
    fresh = state.reset_context()
    assert torch.equal(fresh.writes, state.writes)
    assert torch.equal(fresh.clocks, state.clocks)
    assert fresh.tokens.tolist() == state.tokens.tolist()
    logits, end = read(writer, tokens[:, 18:], state=fresh)
    ours, other = read(writer, tokens[:, 18:], (1, 5), state=fresh)
    assert_close(ours, logits, "split after the reset", 1e-9)
    same_memory(other, end)
    static, _ = read(writer, tokens[:, 18:], learn=False)
    learned, _ = read(writer, tokens[:, 18:], state=fresh, learn=False)
    assert writer.config.continuum == "nested" or float((static - learned).abs().max()) > 1e-4


@pytest.mark.parametrize("periods", [(1,), (3,), (4, 8), (2, 6, 12)])
def test_n_tokens_make_n_minus_one_over_period_writes(periods):
    model, tokens = tiny(periods=periods, inner_lr=0.01), text(1, 30)
    state = None
    for n in range(1, 31):
        _, state = read(model, tokens[:, n - 1 : n], state=state)
        expected = [(n - 1) // p for p in periods]
        assert state.writes.tolist() == [expected], n
        if n in (1, 12, 13, 25):
            assert read(model, tokens[:, :n])[1].writes.tolist() == [expected]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_happen_in_every_grad_mode(writer, mode):
    tokens = text(2, 26)
    with mode():
        out = writer(tokens[:, :11])
        out = writer(tokens[:, 11:], out.state)
        assert out.logits.requires_grad == (mode is torch.enable_grad)
        assert not out.logits.is_inference()
    assert not has_graph(out.state)
    _, state = read(writer, tokens, (11,))
    same_memory(out.state, state, rtol=1e-12)


def test_training_returns_a_state_without_graph(writer):
    loss, state = writer.loss(text(2, 26))
    assert loss.requires_grad and not has_graph(state)


@pytest.mark.parametrize("options", [{}, {"inner_lr": 0.0, "window": 20, "hidden": 3}, {"inner_rule": "adam"}], ids=str)
@pytest.mark.parametrize("kind", ["hope-attention", "hope"])
def test_a_state_stays_below_the_bytes_that_levels_prints(kind, options):
    model = tiny(kind, **{**FAST, "window": 6, "inner_erase": 0.5, "inner_online": True, **options}).float()
    bound = sum(level.state_bytes for level in model.levels())
    tokens = text(3, 50)
    states = [read(model, tokens[i : i + 1, : 7 + i])[1] for i in range(3)]
    state, most = State.stack(states), 0
    for a in range(10, 50, 5):
        with torch.no_grad():
            state = model(tokens[:, a : a + 5], state).state
        most = max(most, state.nbytes)
    assert 0.2 * 3 * bound < most <= 3 * bound


@pytest.mark.parametrize("steps", [0, 30], ids=["at initialisation", "after training"])
@pytest.mark.parametrize("kind", ["hope-attention", "hope"])
def test_twenty_thousand_tokens_stay_finite(kind, steps):
    """The default rules, on a stream of random tokens, in calls of 2,000."""
    model = tiny(kind, periods=(256, 1024, math.inf), window=32, chunk_size=32).float()
    trained(model, steps)
    model.calibrate(text(4, 64))
    state, tokens = None, text(1, 20_000)
    for part in tokens.split(2_000, 1):
        logits, state = read(model, part, state=state)
        assert bool(logits.isfinite().all())
    assert state.writes.tolist() == [[78, 19]]
    assert math.isfinite(written(state))


def trained(model, steps):
    """A few hundred tokens per step of a text that repeats, until the model has learned it in part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    repeated = text(4, 8).repeat(1, 12)
    losses = []
    for _ in range(steps):
        loss, _ = model.loss(repeated)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert steps == 0 or losses[-1] < 0.8 * losses[0]
