"""Decoding is reading with learn=False, a token at a time: same logits and state; fixed shapes, no waiting."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nestling.core.state import flatten, map_tensors, nbytes, tensors, unflatten
from nestling.models import Decoder, LearningDecoder, State
from nestling.models.decoder import decode, put
from nestling.testing import assert_close, assert_trees_close
from tests.models.tiny import read, same_memory, text, tiny, written

FAST = {"periods": (4, 8, math.inf), "inner_lr": 0.05}
MODELS = {
    "transformer": ("transformer", {}),
    "transformer, window": ("transformer", {"window": 5}),
    "transformer, window 1": ("transformer", {"window": 1}),
    "titans-mag, window": ("titans-mag", {"window": 5}),
    "hope-attention": ("hope-attention", FAST),
    "hope-attention, window": ("hope-attention", {**FAST, "window": 6}),
    "hope": ("hope", FAST),
    "hope, factored": ("hope", {**FAST, "periods": (2, 4), "hidden": 40, "dim": 16}),
}
AGES = (1, 7, 13, 4)
CONSTANT = [name for name in MODELS if name.startswith("hope,") or name == "hope" or "window" in name]


@pytest.fixture(params=MODELS)
def model(request):
    return made(request.param)


def made(name):
    kind, options = MODELS[name]
    return tiny(kind, **options)


def prefilled(model, ages=AGES):
    """Rows of different age that have learned, and what comes next in each."""
    tokens = text(len(ages), max(ages))
    return State.stack([read(model, tokens[i : i + 1, :age])[1] for i, age in enumerate(ages)])


def test_every_token_gives_what_a_call_gives(model):
    state, tokens = prefilled(model), text(4, 15, seed=2)
    decoder = Decoder(model, state, room=2)  # and so caches grow on the way
    for t in range(15):
        logits, state = read(model, tokens[:, t : t + 1], state=state, learn=False)
        assert_close(decoder.step(tokens[:, t]), logits[:, 0], f"logits of token {t}")
        assert_trees_close(decoder.state.tree, state.tree, f"state after token {t}")


def test_the_weights_it_reads_with_were_written():
    for name in ("hope", "hope, factored", "hope-attention"):
        model = made(name)
        assert written(prefilled(model)) > 1e-3


def test_a_row_that_has_stopped_stays_as_it_was(model):
    state, tokens = prefilled(model), text(4, 9, seed=2)
    stops = torch.tensor([9, 3, 0, 6])
    decoder = Decoder(model, state)
    for t in range(9):
        decoder.step(tokens[:, t], active=t < stops)
    for row, stop in enumerate(stops.tolist()):
        _, alone = read(model, tokens[row : row + 1, :stop], state=state.select([row]), learn=False)
        more = text(1, 11, seed=3)
        ours, after = read(model, more, state=decoder.state.select([row]))
        theirs, expected = read(model, more, state=alone)
        assert_close(ours, theirs, f"what row {row} reads next")
        same_memory(after, expected, rtol=1e-10)
    assert decoder.state.tokens.tolist() == (state.tokens + stops).tolist()


def test_reading_goes_on_and_learns_afterwards(model):
    state, tokens, more = prefilled(model), text(4, 5, seed=2), text(4, 19, seed=3)
    decoder = Decoder(model, state)
    for t in range(5):
        decoder.step(tokens[:, t])
    ours, after = read(model, more, state=decoder.state)
    theirs, expected = read(model, more, state=read(model, tokens, state=state, learn=False)[1])
    assert_close(ours, theirs, "logits")
    same_memory(after, expected, rtol=1e-10)


def test_its_state_is_a_value(model):
    """What it gave before, and what it was made from, is not written to by later steps."""
    state, tokens = prefilled(model), text(4, 8, seed=2)
    decoder = Decoder(model, state)
    decoder.step(tokens[:, 0])
    kept = [state, decoder.state]
    before = [[x.clone() for x in tensors(s.tree)] for s in kept]
    for t in range(1, 8):
        decoder.step(tokens[:, t])
    for s, values in zip(kept, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(s.tree), values, strict=True))


def test_empty_contexts_are_decoded_too(model):
    state, tokens = prefilled(model).reset_context(), text(4, 6, seed=2)
    decoder = Decoder(model, state)
    ours = torch.stack([decoder.step(tokens[:, t]) for t in range(6)], 1)
    theirs, expected = read(model, tokens, state=state, learn=False)
    assert_close(ours, theirs, "logits")
    same_memory(decoder.state, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("hope")])
def test_what_is_decoded_can_be_learned_from(name):
    """Over many writes in rows of different phase, one of which stops; asked for the state on the way, or not."""
    model = made(name)
    state, tokens = prefilled(model), text(4, 21, seed=2)
    stops = torch.tensor([21, 21, 6, 21])
    decoder, asked = LearningDecoder(model, state, room=3), LearningDecoder(model, state, room=3)
    for t in range(21):
        reads = t < stops
        logits, state = read(model, tokens[:, t : t + 1], state=state, mask=reads[:, None])
        ours, theirs = decoder.step(tokens[:, t], reads), asked.step(tokens[:, t], reads)
        assert_close(ours[reads], logits[reads, 0], f"logits of token {t}", 1e-9)
        assert_close(theirs[reads], logits[reads, 0], f"logits of token {t}", 1e-9)
        if t % 3 == 0:
            same_memory(asked.state, state)
    more = text(4, 9, seed=3)
    for final in (decoder.state, asked.state):
        same_memory(final, state)
        assert_close(read(model, more, state=final)[0], read(model, more, state=state)[0], "what follows", 1e-9)


def test_a_sealed_segment_closes_before_it_is_decoded_on():
    model = made("hope")
    _, state = read(model, text(2, 2, seed=2), state=prefilled(model, (6, 7)), learn=False)
    decoder, tokens = LearningDecoder(model, state, room=9), text(2, 9, seed=3)
    for t in range(9):
        logits, state = read(model, tokens[:, t : t + 1], state=state)
        assert_close(decoder.step(tokens[:, t]), logits[:, 0], f"logits of token {t}", 1e-9)
    same_memory(decoder.state, state)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_it_decodes_in_every_grad_mode(model, mode):
    start = prefilled(model)
    with mode():
        decoder = Decoder(model, start)
        logits = decoder.step(text(4, 1)[:, 0])
        state = decoder.state
    assert not logits.requires_grad and not any(x.is_inference() or x.requires_grad for x in tensors(state.tree))
    read(model, text(4, 9), state=state)


@pytest.mark.parametrize("name", CONSTANT)
def test_a_state_of_constant_size(name):
    model = made(name)
    decoder = Decoder(model, prefilled(model), room=6)
    sizes = set()
    for t in range(14):
        decoder.step(text(4, 14)[:, t])
        sizes.add(nbytes(decoder.mixers))
    assert len(sizes) == 1


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_step_is_a_fixed_list_of_operations(name, active):
    """Traced with fake tensors, which have no values to wait for; the trace then decodes other tokens at other ages."""
    model = made(name)
    first, decoder = (Decoder(model, prefilled(model, ages), room=16) for ages in ((5, 14, 6, 9), AGES))
    decoder.now = first.now
    flags = (torch.tensor([True, True, False, True]),) if active else ()

    def step(tokens, *rest):
        named = dict(zip(names, rest[len(flags) :], strict=True))
        logits, after = decode(model, first.now, tokens, unflatten(named, skeleton), *rest[: len(flags)])
        return logits, *tensors(after)

    named, skeleton = flatten(first.mixers)
    names = list(named)
    tokens = text(4, 9, seed=2)
    with torch.no_grad():
        graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(tokens[:, 0], *flags, *named.values())
    assert "lift_fresh" not in graph.code  # a constant would be copied to the device at every step
    state = map_tensors(torch.Tensor.clone, decoder.mixers)
    for t in range(9):
        logits, *after = graph(tokens[:, t], *flags, *flatten(state)[0].values())
        put(state, unflatten(dict(zip(names, after, strict=True)), skeleton))
        expected = decoder.step(tokens[:, t], *flags)
        rows = flags[0] if flags else slice(None)
        assert_close(logits[rows], expected[rows], f"logits of token {t}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU with CUDA")
def test_a_captured_graph_decodes_the_same(model):
    state, tokens = prefilled(model).to("cuda"), text(4, 9, seed=2).cuda()
    model = model.cuda()
    captured, eager = Decoder(model, state, room=4, graph=True), Decoder(model, state)
    for t in range(9):
        active = torch.tensor([True, t < 5, True, True], device="cuda")
        ours, theirs = captured.step(tokens[:, t], active), eager.step(tokens[:, t], active)
        assert_close(ours[active], theirs[active], f"logits of token {t}", 1e-9)
    assert_trees_close(captured.state.tree, eager.state.tree, "state", 1e-9)


def test_a_model_that_never_writes_has_nothing_to_learn():
    model = made("transformer")
    with pytest.raises(ValueError, match="use Decoder"):
        LearningDecoder(model, prefilled(model), room=2)


def test_a_graph_without_a_gpu_is_one_line(model):
    with pytest.raises(ValueError, match="graph=True needs a state on a CUDA device"):
        Decoder(model, prefilled(model), graph=True)


def test_a_state_that_changes_its_shape_cannot_be_put_back():
    with pytest.raises(ValueError, match="fixed shapes"):
        put([torch.zeros(2, 3)], [torch.zeros(2, 4)])
