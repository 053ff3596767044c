"""Any split into calls is one call; rows, masks, documents and pauses do what forward() promises."""

import math

import pytest
import torch

from nestling.models import State
from nestling.testing import assert_close
from tests.models.tiny import has_graph, read, same_memory, text, tiny, written

LENGTH = 27
FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.05}
MODELS = {
    "transformer": ("transformer", {}),
    "transformer, window": ("transformer", {"window": 5}),
    "hope-attention": ("hope-attention", FAST),
    "hope-attention, window": ("hope-attention", {**FAST, "window": 6}),
    "hope": ("hope", FAST),
    "momentum": ("hope-attention", {**FAST, "inner_rule": "momentum", "inner_relative": False}),
    "adam": ("hope-attention", {**FAST, "inner_rule": "adam", "inner_decay": 0.1}),
    "erase": ("hope-attention", {"periods": (2, 6), "inner_lr": 0.05, "inner_erase": 0.5}),
    "online": ("hope-attention", {**FAST, "inner_online": True, "reset": "document"}),
    "learned": ("hope-attention", {**FAST, "inner_learned": True}),
    "nested": ("hope-attention", {"periods": (4, 8, 16), "inner_lr": 0.05, "continuum": "nested"}),
    "independent": ("hope-attention", {"periods": (4, 8, 16), "inner_lr": 0.05, "continuum": "independent"}),
}
WRITING = [name for name in MODELS if not name.startswith("transformer")]
CUTS = [(4, 8), (2, 3, 17, 26), tuple(range(1, LENGTH))]


def made(name):
    kind, options = MODELS[name]
    model = tiny(kind, **options)
    if name in ("hope-attention", "online"):
        model.calibrate(text(3, 40, seed=9))
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return made(request.param)


@pytest.fixture(params=WRITING)
def writer(request):
    return made(request.param)


def documents(rows, length):
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[0, 9] = starts[0, 10] = starts[1, 0] = starts[1, 19] = starts[2, 8] = True
    return starts


def holes(rows, length, seed=3):
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[0, 5:15] = False
    mask[1, 21:] = False
    return mask


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: "-".join(map(str, cuts[:5])))
def test_any_split_into_calls_is_one_call(model, cuts):
    tokens = text(2, LENGTH)
    logits, state = read(model, tokens)
    ours, end = read(model, tokens, cuts)
    assert_close(ours, logits, "logits", 1e-9)
    same_memory(end, state)


def test_the_split_test_compares_something(writer):
    """Written weights and the logits of written and frozen models differ, or the test above would compare nothing."""
    tokens = text(2, LENGTH)
    logits, state = read(writer, tokens)
    frozen, _ = read(writer, tokens, learn=False)
    period = int(min(p for p in writer.config.periods))
    assert written(state) > 1e-3 or writer.config.continuum == "nested"
    assert_close(logits[:, :period], frozen[:, :period], "the first segment", 1e-12)
    assert float((logits[:, period:] - frozen[:, period:]).abs().max()) > 1e-3


@pytest.mark.parametrize("extra", ["mask", "documents", "both"])
@pytest.mark.parametrize("cuts", [(9, 23), (5, 10, 11)], ids=str)
def test_masks_and_documents_split_too(model, extra, cuts):
    tokens, by_token = text(3, LENGTH), {}
    if extra != "documents":
        by_token["mask"] = holes(3, LENGTH)
    if extra != "mask":
        by_token["new_document"] = documents(3, LENGTH)
    logits, state = read(model, tokens, **by_token)
    ours, end = read(model, tokens, cuts, **by_token)
    assert_close(ours, logits, "logits", 1e-9)
    same_memory(end, state)


def test_masked_tokens_are_nowhere(model):
    tokens, mask = text(3, LENGTH), holes(3, LENGTH)
    logits, state = read(model, tokens, mask=mask)
    other, _ = read(model, torch.where(mask, tokens, (tokens + 3) % 11), mask=mask)
    assert torch.equal(logits, other)
    assert not logits[~mask].any()
    for row in range(3):
        alone, end = read(model, tokens[row : row + 1, mask[row]])
        assert_close(logits[row, mask[row]], alone[0], f"row {row}", 1e-9)
        same_memory(state.select([row]), end)


def test_a_call_of_masked_tokens_only_changes_nothing(model):
    tokens = text(2, 10)
    _, before = read(model, tokens)
    logits, after = read(model, tokens, state=before, mask=torch.zeros(2, 10, dtype=torch.bool))
    assert not logits.any()
    ours, _ = read(model, tokens, state=after)
    theirs, _ = read(model, tokens, state=before)
    assert_close(ours, theirs, "what follows", 1e-12)


def test_later_tokens_change_no_earlier_logit(model):
    tokens = text(2, LENGTH)
    logits, _ = read(model, tokens)
    for place in (3, 4, 5, 17):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 11
        ours, _ = read(model, changed)
        assert torch.equal(ours[:, :place], logits[:, :place]), place
        assert float((ours[:, place] - logits[:, place]).abs().max()) > 1e-6


def test_the_token_after_a_segment_is_read_with_the_new_weights():
    model = tiny(periods=(4,), inner_lr=0.5)
    tokens = text(1, 5)
    logits, state = read(model, tokens)
    frozen, _ = read(model, tokens, learn=False)
    assert state.writes.tolist() == [[1]]
    assert float((logits[:, 4] - frozen[:, 4]).abs().max()) > 1e-3


def test_rows_do_not_interact(model):
    tokens = text(3, LENGTH)
    logits, state = read(model, tokens)
    for row in range(3):
        alone, end = read(model, tokens[row : row + 1])
        assert_close(logits[row : row + 1], alone, f"row {row}", 1e-9)
        same_memory(state.select([row]), end)


def test_rows_of_different_age_stack(model):
    ages, more = (1, 6, 13, 16), 11
    tokens = text(4, max(ages) + more)
    states = [read(model, tokens[i : i + 1, :age])[1] for i, age in enumerate(ages)]
    stacked = State.stack(states)
    assert stacked.tokens.tolist() == list(ages)
    following = torch.stack([tokens[i, age : age + more] for i, age in enumerate(ages)])
    for cuts in ((), (1, 7)):
        logits, end = read(model, following, cuts, state=stacked)
        for i, age in enumerate(ages):
            alone, final = read(model, tokens[i : i + 1, : age + more])
            assert_close(logits[i], alone[0, age:], f"row {i}", 1e-9)
            same_memory(end.select([i]), final)
    assert stacked.select([2, 0]).tokens.tolist() == [13, 1]


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


def test_reset_context_without_writes_is_a_fresh_state():
    for kind in ("transformer", "hope"):
        model = tiny(kind, periods=(math.inf,))
        _, state = read(model, text(2, 12))
        ours, _ = read(model, text(2, 12, seed=5), state=state.reset_context())
        theirs, _ = read(model, text(2, 12, seed=5))
        assert_close(ours, theirs, kind, 1e-12)


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


def test_an_empty_call_reads_nothing(model):
    _, state = read(model, text(2, 7))
    out = model(text(2, 7)[:, :0], state)
    assert out.logits.shape == (2, 0, 11)
    assert_close(read(model, text(2, 9), state=out.state)[0], read(model, text(2, 9), state=state)[0], "after it")


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
