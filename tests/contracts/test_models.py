"""What every model promises: any split into calls, masks, documents, rows, states, decoding, gradients, levels."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestling
from nestling.core.state import flatten, tensors
from nestling.models import NAMES, Decoder, State, build
from nestling.testing import assert_close, assert_trees_close
from tests.contracts.models import BASELINES, FROZEN, MODELS, made
from tests.models.tiny import has_graph, read, same_memory, text, tiny

LENGTH = 27
CUTS = [(4, 8), (2, 3, 17, 26), tuple(range(1, LENGTH))]


@pytest.fixture(params=MODELS)
def model(request):
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
    assert_trees_close(end.tree.mixers, state.tree.mixers, "mixers", 1e-9)


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


def test_an_empty_call_reads_nothing(model):
    _, state = read(model, text(2, 7))
    out = model(text(2, 7)[:, :0], state)
    assert out.logits.shape == (2, 0, 11)
    assert_close(read(model, text(2, 9), state=out.state)[0], read(model, text(2, 9), state=state)[0], "after it")


def test_the_list_has_every_name():
    assert {kind for kind, _ in MODELS.values()} == set(NAMES)


@pytest.mark.parametrize("name", FROZEN)
def test_without_levels_that_write_an_empty_context_is_a_fresh_state(name):
    model = made(name)
    _, state = read(model, text(2, 12))
    ours, _ = read(model, text(2, 12, seed=5), state=state.reset_context())
    theirs, _ = read(model, text(2, 12, seed=5))
    assert_close(ours, theirs, name, 1e-12)
    assert state.writes.shape[1] == 0


@pytest.mark.parametrize("name", FROZEN)
def test_a_document_starts_from_a_fresh_state(name):
    model, tokens = made(name), text(2, 20)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[0, 10] = True
    logits, _ = read(model, tokens, new_document=starts)
    assert_close(logits[:1, 10:], read(model, tokens[:1, 10:])[0], "second document", 1e-9)
    assert_close(logits[1:], read(model, tokens[1:])[0], "a row without a border", 1e-9)


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_there_is_nothing_to_learn_in_any_grad_mode(name, mode):
    model, tokens = made(name), text(2, 10)
    with mode():
        learning = model(tokens)
        frozen = model(tokens, learn=False)
    assert torch.equal(learning.logits, frozen.logits)
    assert_trees_close(learning.state.tree.mixers, frozen.state.tree.mixers, rtol=0.0)
    assert not has_graph(learning.state) and not any(x.is_inference() for x in tensors(learning.state.tree))


@pytest.mark.parametrize("name", BASELINES)
def test_a_state_comes_back_from_a_file_with_equal_bits(name, tmp_path):
    model = made(name)
    _, state = read(model, text(2, 8))
    nestling.save_state(state, tmp_path / "memory")
    back = nestling.load_state(tmp_path / "memory")
    ours, theirs = flatten(back.tree), flatten(state.tree)
    assert ours[1] == theirs[1] and all(torch.equal(ours[0][n], x) for n, x in theirs[0].items())
    assert torch.equal(read(model, text(2, 5), state=back)[0], read(model, text(2, 5), state=state)[0])
    with pytest.raises(ValueError, match="belongs to model"):
        read(tiny(name, seed=1), text(2, 5), state=nestling.load_state(tmp_path / "memory"))


@pytest.mark.parametrize("name", BASELINES)
def test_greedy_generation_is_reading_everything_again(name):
    model, prompt = made(name), text(2, 9)
    generated = model.generate(prompt, 5, temperature=0.0).all()
    tokens = prompt
    for _ in range(5):
        tokens = torch.cat([tokens, read(model, tokens)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, tokens[:, 9:])


@pytest.mark.parametrize("name", BASELINES)
def test_decoding_rows_of_mixed_age_is_reading_them(name):
    """One of which stops, on the way over many chunks and windows."""
    model, ages = made(name), (1, 7, 13)
    states = [read(model, text(1, age, seed=age))[1] for age in ages]
    state, tokens, stops = State.stack(states), text(3, 9, seed=2), torch.tensor([9, 4, 9])
    decoder = Decoder(model, state, room=2)
    for t in range(9):
        active = t < stops
        logits, state = read(model, tokens[:, t : t + 1], state=state, mask=active[:, None])
        assert_close(decoder.step(tokens[:, t], active)[active], logits[active, 0], f"logits of token {t}", 1e-9)
    ours, _ = read(model, text(3, 7), state=decoder.state)
    assert_close(ours, read(model, text(3, 7), state=state)[0], "what follows", 1e-9)


@pytest.mark.parametrize("name", BASELINES)
def test_loss_has_the_gradients_of_the_cross_entropy(name):
    model, tokens = made(name), text(2, 13)
    model.loss(tokens)[0].backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for n, p in model.named_parameters():
        assert_close(ours[n], p.grad, n, 1e-9)


@pytest.mark.parametrize("name", BASELINES)
def test_the_backward_pass_inside_loss_does_not_see_autocast(name):
    """Its gradients are those of a backward pass that runs outside, where torch wants it: float32 stays float32."""
    model, tokens = made(name).float(), text(2, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(tokens)
        logits = model(tokens).logits[:, :-1].flatten(0, 1).float()
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    for n, p in model.named_parameters():
        assert_close(ours[n], p.grad / tokens[:, 1:].numel(), n, 1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_counts(name):
    """Each parameter belongs to one box, and a state stays below the bytes that the boxes say."""
    model = made(name).float()
    boxes = nestling.levels(model)
    assert boxes.parameters == model.num_parameters()
    states = [model(text(3, n)).state for n in (6, 8, 40)]
    allowed = 3 * sum(box.state_bytes or 0 for box in boxes)
    assert 0.4 * allowed < max(state.nbytes for state in states) <= allowed + 3 * 8  # 8: tokens read


@pytest.mark.parametrize("name", BASELINES)
def test_flops_per_token(name):
    """Matrices once is what it counts: below what torch counts, which sees the writes of a memory too, but not far."""
    torch.manual_seed(0)
    model = build(MODELS[name][0], vocab_size=64, dim=32, depth=2, heads=2, window=16, chunk_size=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(64, (1, 64)))
    assert 0.4 < model.flops_per_token() / (counter.get_total_flops() / 64) < 1.05
    attends = any(box.period == 0 for box in model.levels())
    assert (model.flops_per_token(16) > model.flops_per_token(8)) == attends
