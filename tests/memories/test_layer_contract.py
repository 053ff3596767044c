"""The contract of token-memory layers, the same checks for each: any cut, any age, padding, rows, gradients, levels."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nestling.core.state import flatten, nbytes, select_rows, stack_rows, tensors, unflatten
from nestling.memories.hebbian import LinearAttention, Retention
from nestling.memories.hierarchical import HierarchicalTitans
from nestling.memories.linear import DeltaRule, GatedDeltaRule
from nestling.memories.mamba import Mamba
from nestling.memories.titans import TitansMemory
from nestling.memories.titans_context import MemoryAsContext
from nestling.memories.titans_hybrids import MemoryAsGate, MemoryAsLayer
from nestling.memories.ttt import TTTMemory
from nestling.testing import assert_close, assert_trees_close, state_roundtrip

DIM, HEADS, CHUNK = 16, 2, 8
LAYERS = {
    "linear attention": lambda: LinearAttention(DIM, HEADS, CHUNK),
    "linear attention, normed": lambda: LinearAttention(DIM, HEADS, CHUNK, expansion=2, normalise=False),
    "retention": lambda: Retention(DIM, HEADS, CHUNK),
    "delta rule": lambda: DeltaRule(DIM, HEADS, CHUNK),
    "gated delta rule": lambda: GatedDeltaRule(DIM, HEADS, CHUNK, expansion=2),
    "mamba": lambda: Mamba(DIM, CHUNK, states=4),
    "ttt mlp": lambda: TTTMemory(DIM, HEADS, chunk_size=CHUNK),
    "ttt linear": lambda: TTTMemory(DIM, HEADS, chunk_size=CHUNK, memory="linear"),
    "titans mlp": lambda: TitansMemory(DIM, HEADS, chunk_size=CHUNK),
    "titans linear": lambda: TitansMemory(DIM, HEADS, chunk_size=CHUNK, memory="linear"),
    "hierarchical titans": lambda: HierarchicalTitans(DIM, HEADS, chunk_size=3, global_chunk=CHUNK, shard=11),
    "titans plain": lambda: TitansMemory(DIM, HEADS, chunk_size=CHUNK, momentum=None, half_life=None),
    "titans as gate": lambda: MemoryAsGate(DIM, HEADS, chunk_size=CHUNK, window=CHUNK),
    "titans as context": lambda: MemoryAsContext(DIM, HEADS, chunk_size=CHUNK),
    "titans as layer": lambda: MemoryAsLayer(DIM, HEADS, chunk_size=CHUNK, window=CHUNK - 3),
    "titans to zero": lambda: TitansMemory(DIM, HEADS, chunk_size=CHUNK, decay_to="zero"),
}
EXACT = ("linear attention", "linear attention, normed", "retention", "delta rule", "gated delta rule", "mamba")
CACHES = ("titans as gate", "titans as layer")  # they decode single tokens in buffers (tests/models/test_decoder.py)
EVERY = pytest.mark.parametrize("name", LAYERS)


def made(name, dtype=torch.float64):
    return LAYERS[name]().to(dtype)


def stream(tokens, rows=2, dtype=torch.float64):
    return torch.randn(rows, tokens, DIM, dtype=dtype)


@EVERY
@pytest.mark.parametrize("cuts", [[1], [8], [5, 6, 21], [16, 30], list(range(1, 37))], ids=str)
def test_any_split_gives_the_same_output_and_state(name, cuts):
    state_roundtrip(made(name), stream(37), cuts)


@EVERY
def test_rows_of_different_age_go_on_together(name):
    layer, old, young, new = made(name), stream(21, 1), stream(3, 1), stream(20)
    _, first = layer(old)
    _, second = layer(young)
    together, state = layer(new, stack_rows([first, second], [1, 1]))
    for row, past in enumerate((old, young)):
        whole, end = layer(torch.cat([past, new[row : row + 1]], 1))
        assert_close(together[row : row + 1], whole[:, past.shape[1] :], f"output of row {row}")
        mine = select_rows(state, [row])
        assert_trees_close(mine, end, f"state of row {row}")


@EVERY
def test_a_fresh_row_stands_beside_an_old_one(name):
    """None for a row that has not begun is not a state; select_rows of a zero-token call is."""
    layer = made(name)
    _, old = layer(stream(11, 1))
    _, fresh = layer(stream(0, 1))
    new = stream(9)
    y, _ = layer(new, stack_rows([old, fresh], [1, 1]))
    alone, _ = layer(new[1:])
    assert_close(y[1:], alone, "fresh row")


@EVERY
def test_single_tokens_of_rows_of_mixed_phase_go_on_as_each_row_alone(name):
    """Twelve steps over chunks of 8, rows pausing now and then."""
    layer, pasts = made(name), [stream(age, 1) for age in (0, 1, 6, 7, 8)]
    state = stack_rows([layer(past)[1] for past in pasts], [1] * 5)
    x, written, outputs = stream(12, 5), [[] for _ in pasts], [[] for _ in pasts]
    for t in range(12):
        lengths = torch.tensor([1, 0, 1, 1, 0]) if t % 3 == 2 else None
        y, state = layer(x[:, t : t + 1], state, lengths)
        for row in range(5):
            if lengths is None or lengths[row]:
                written[row].append(x[row : row + 1, t : t + 1])
                outputs[row].append(y[row : row + 1])
    for row, past in enumerate(pasts):
        whole, end = layer(torch.cat([past, *written[row]], 1))
        assert_close(torch.cat(outputs[row], 1), whole[:, past.shape[1] :], f"output of row {row}")
        assert_trees_close(select_rows(state, [row]), end, f"state of row {row}")


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in CACHES])
def test_a_single_token_needs_no_value_on_the_host(name):
    """Tensors without values: whatever asked for one, or for a shape that depends on one, would raise."""
    with FakeTensorMode():
        layer = LAYERS[name]()
        state = stack_rows([layer(torch.randn(1, age, DIM))[1] for age in (3, 5)], [1, 1])
        for lengths in (None, torch.tensor([1, 0])):
            y, after = layer(torch.randn(2, 1, DIM), state, lengths)
            assert y.shape == (2, 1, DIM)
            assert [x.shape for x in tensors(after)] == [x.shape for x in tensors(state)]
        if name not in EXACT:
            with pytest.raises(DataDependentOutputException):  # several tokens do ask for the phases of the rows
                layer(torch.randn(2, 2, DIM), state)


@EVERY
@pytest.mark.parametrize("before", [0, 5])
def test_padding_changes_nothing(name, before):
    layer, x, lengths = made(name), stream(30, 3), torch.tensor([30, 13, 0])
    start = layer(stream(before, 3))[1] if before else None
    y, state = layer(x, start, lengths)
    x_other = x.clone()
    for row, n in enumerate(lengths):
        x_other[row, n:] = 100.0
    _, other = layer(x_other, start, lengths)
    assert_trees_close(other, state, "state with other padding")
    assert bool(y.isfinite().all())
    for row, n in enumerate(lengths):
        alone, end = layer(x[row : row + 1, :n], None if start is None else select_rows(start, [row]))
        assert_close(y[row : row + 1, :n], alone, f"output of row {row}")
        probe = stream(10, 1)
        after, _ = layer(probe, select_rows(state, [row]))
        assert_close(after, layer(probe, end)[0], f"what row {row} has learned")


@EVERY
def test_rows_do_not_interact(name):
    layer, x = made(name), stream(30)
    y, state = layer(x)
    alone, end = layer(x[1:])
    assert_close(y[1:], alone, "output")
    assert_trees_close(select_rows(state, [1]), end, "state")


@EVERY
@pytest.mark.parametrize("t", [7, 8, 12])
def test_causality(name, t):
    layer, x = made(name), stream(30)
    before, _ = layer(x)
    x[:, t:] += 1
    after, _ = layer(x)
    assert_close(after[:, :t], before[:, :t], "earlier outputs")
    assert not torch.equal(after[:, t:], before[:, t:])


@EVERY
def test_the_memory_remembers(name):
    """An early token changes late outputs, long after the convolution has let go of it."""
    layer, x = made(name), stream(60)
    before, _ = layer(x)
    x[:, 0] += 1
    after, _ = layer(x)
    assert (after[:, -1] - before[:, -1]).norm() > 1e-6 * before[:, -1].norm()


@EVERY
def test_outer_gradient_reaches_every_parameter(name):
    layer = made(name, torch.float32)
    y, _ = layer(stream(149, dtype=torch.float32))
    (y * torch.randn_like(y)).sum().backward()
    norms = {n: p.grad.norm() for n, p in layer.named_parameters()}
    median = torch.stack(list(norms.values())).median()
    assert all(norm > 0 for norm in norms.values()), norms
    for n, norm in norms.items():
        assert "initial" not in n or norm >= 1e-4 * median, (n, norm, median)


@EVERY
def test_gradient_flows_through_the_state(name):
    layer = made(name)
    x = stream(20).requires_grad_()
    _, state = layer(x)
    layer(stream(20), state)[0].square().sum().backward()
    assert x.grad[:, 0].norm() > 0


@EVERY
def test_cut_gradients_are_whole_gradients(name):
    layer, x = made(name), stream(30)
    layer(x)[0].square().sum().backward()
    whole = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    first, state = layer(x[:, :11])
    second, _ = layer(x[:, 11:], state)
    (first.square().sum() + second.square().sum()).backward()
    for n, p in layer.named_parameters():
        assert_close(p.grad, whole[n], f"gradient of {n}", rtol=1e-8)


@EVERY
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_twenty_thousand_tokens_stay_finite(name, kind):
    layer = made(name, torch.float32)
    if name == "titans as context":  # long segments, of which it reads one after the other
        layer = MemoryAsContext(DIM, HEADS, chunk_size=500)
    state, largest = None, 0.0
    with torch.inference_mode():
        for _ in range(10):
            x = stream(2000, 1, torch.float32)
            y, state = layer(torch.ones_like(x) if kind == "constant" else x, state)
            largest = max(largest, float(y.abs().max()))
    assert math.isfinite(largest) and largest < 100
    assert all(bool(x.isfinite().all()) for x in tensors(state))


@EVERY
def test_forward_changes_no_attribute(name):
    layer, x = made(name), stream(20)
    before = {n: x.clone() for n, x in layer.state_dict().items()}
    y, state = layer(x)
    again, _ = layer(x)
    assert torch.equal(y, again)
    layer(x, state)
    assert all(torch.equal(x, layer.state_dict()[n]) for n, x in before.items())


@EVERY
def test_state_goes_through_a_file_and_comes_back_equal(name):
    layer = made(name)
    _, state = layer(stream(13))
    assert_trees_close(unflatten(*flatten(state)), state, "state", rtol=0.0)


@EVERY
def test_memory_is_float32_under_autocast(name):
    layer = made(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(stream(20, dtype=torch.float32))
    parts = {n: x for n, x in flatten(state)[0].items() if x.is_floating_point()}
    memory = [x for n, x in parts.items() if not n.endswith("tail") and not n.startswith("attention")]
    assert len(memory) > 0 and all(x.dtype == torch.float32 for x in memory)
    assert bool(y.isfinite().all())


@EVERY
def test_levels_bound_the_state_and_count_every_parameter(name):
    layer = made(name, torch.float32)
    *memories, static = layer.levels()
    assert sum(level.parameters for level in layer.levels()) == sum(p.numel() for p in layer.parameters())
    assert static.period == math.inf and all(memory.period in (0, 1) for memory in memories)
    largest = max(nbytes(layer(stream(n, 1, torch.float32))[1]) for n in (CHUNK - 1, CHUNK, 3 * CHUNK - 1))
    assert largest <= sum(memory.state_bytes for memory in memories) <= 1.1 * largest
    for memory in memories:
        assert memory.half_life is None or memory.half_life >= 1024 * (1 - 1e-6) or name in EXACT


@pytest.mark.parametrize("name", ["gated delta rule", "retention", "titans mlp"])
def test_the_printed_half_life_is_the_observed_one(name):
    """Zero inputs have zero keys: nothing is written, and what was written fades."""
    layer = made(name)
    _, state = layer(stream(64))
    n = 512
    _, later = layer(torch.zeros(2, n, DIM, dtype=torch.float64), state)
    _, last = layer(torch.zeros(2, 2 * n, DIM, dtype=torch.float64), state)
    pick = (lambda s: s.memory.running[0]) if name.startswith("titans") else (lambda s: s.memory)

    def size(s):  # (H,)
        return pick(s).square().sum((0, 2, 3)).sqrt()

    kept = (size(last) / size(later)).max().item()  # the head that keeps most
    assert kept == pytest.approx(0.5 ** (n / layer.levels()[0].half_life), rel=1e-3)


@EVERY
def test_bad_width_is_named(name):
    with pytest.raises(ValueError, match=f"needs \\(B, T, {DIM}\\)"):
        made(name)(torch.zeros(1, 4, DIM + 1, dtype=torch.float64))


@pytest.mark.parametrize("layer", [DeltaRule, TTTMemory, TitansMemory])
def test_bad_heads_are_named(layer):
    with pytest.raises(ValueError, match="dim=16 is not divisible by heads=3"):
        layer(16, 3)


@pytest.mark.parametrize("option", ["expansion", "chunk_size", "eta_max", "half_life"])
def test_bad_sizes_are_named(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        TitansMemory(DIM, HEADS, **{option: 0})


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        DeltaRule(DIM, HEADS, 0)
    with pytest.raises(ValueError, match="memory='cube'"):
        TTTMemory(DIM, HEADS, memory="cube")
    with pytest.raises(ValueError, match="decay_to='rest'"):
        TitansMemory(DIM, HEADS, decay_to="rest")


def test_chunk_size_of_linear_layers_is_only_speed():
    layer, x = made("gated delta rule"), stream(50)
    other = GatedDeltaRule(DIM, HEADS, chunk_size=64, expansion=2).double()
    other.load_state_dict(layer.state_dict())
    assert_close(other(x)[0], layer(x)[0], "output")
