"""The self-modifying layer: any split is the whole, rows do not meet, every initial state learns, half-lives hold."""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nestling.core.state import detach, flatten, nbytes, replace, select_rows, stack_rows, tensors, unflatten
from nestling.memories import projections
from nestling.memories.projections import ShortConvolution
from nestling.memories.self_modifying import SelfModifyingTitans
from nestling.ops import dispatch
from nestling.ops.self_modifying import Rule, reference

VARIANTS = {
    "default": {},
    "linear": {"memory": "linear"},
    "mlp": {"memory": "mlp"},
    "generated queries": {"adaptive_q": True},
    "expansion 1.5": {"expansion": 1.5},
    "anchor": {"rule": Rule(read="anchor")},
    "literal": {"memory": "mlp", "rule": Rule(objective="l2", erase="undecayed", decay_to="zero", eta_max=0.5)},
}


def layer(variant="default", dim=16, heads=2, chunk_size=4):
    return SelfModifyingTitans(dim, heads, chunk_size=chunk_size, **VARIANTS[variant]).double()


def sequence(rows=2, tokens=14, dim=16):
    return torch.randn(rows, tokens, dim, dtype=torch.float64)


def assert_states_equal(a, b):
    """Equal up to rounding, tensor by tensor."""
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [(4, 8), (1, 2, 3), (5, 13), (0, 14)], ids=str)
def test_any_split_into_calls_equals_the_whole(variant, cuts):
    memory, x = layer(variant), sequence()
    whole, want = memory(x)
    parts, state = [], None
    for start, end in zip((0, *cuts), (*cuts, 14), strict=True):
        y, state = memory(x[:, start:end], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    assert_states_equal(state, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_tokens_equal_the_loop_for_rows_of_mixed_phase(variant, monkeypatch):
    """Ten steps of chunks of four, rows one to three tokens apart, some of them pausing, against the reference."""
    memory = layer(variant)
    state = stack_rows([memory(sequence(1, age))[1] for age in (0, 1, 2, 7)], [1] * 4)
    x = sequence(4, 10)
    for t in range(10):
        one, lengths = x[:, t : t + 1], None if t % 3 else torch.tensor([1, 0, 1, 1])
        monkeypatch.setattr(dispatch, "self_modifying", reference.self_modifying)
        want = memory(one, state, lengths)
        monkeypatch.undo()
        y, state = memory(one, state, lengths)
        torch.testing.assert_close(y, want[0], rtol=1e-10, atol=1e-12)
        assert_states_equal(state, want[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_token_needs_no_value_on_the_host(variant):
    """Tensors without values: whatever asked for one, or for a shape that depends on one, would raise."""
    with FakeTensorMode():
        memory = SelfModifyingTitans(16, 2, chunk_size=4, **VARIANTS[variant])
        state = stack_rows([memory(torch.randn(1, age, 16))[1] for age in (3, 5)], [1, 1])
        for lengths in (None, torch.tensor([1, 0])):
            y, after = memory(torch.randn(2, 1, 16), state, lengths)
            assert y.shape == (2, 1, 16)
            assert [t.shape for t in tensors(after)] == [t.shape for t in tensors(state)]
        with pytest.raises(DataDependentOutputException):  # several tokens do ask for the phases of the rows
            memory(torch.randn(2, 2, 16), state)


def test_gradients_flow_through_the_carried_state():
    memory, x = layer(), sequence()
    whole = torch.autograd.grad(memory(x)[0][:, 10:].square().sum(), list(memory.parameters()))
    _, state = memory(x[:, :10])
    split = torch.autograd.grad(memory(x[:, 10:], state)[0].square().sum(), list(memory.parameters()))
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variant", ["default", "mlp"])
def test_rows_of_different_age_stack_and_do_not_meet(variant):
    memory, ages = layer(variant), (0, 3, 4, 9)
    histories = [sequence(1, age) for age in ages]
    states = [memory(h)[1] if h.shape[1] else None for h in histories]
    x = sequence(4, 7)
    alone = [memory(x[i : i + 1], state) for i, state in enumerate(states)]
    y, state = memory(x, stack_rows(states, [1] * 4))
    torch.testing.assert_close(y, torch.cat([a for a, _ in alone]), rtol=1e-10, atol=1e-12)
    for i, (_, want) in enumerate(alone):
        got = select_rows(state, [i])
        assert_states_equal(got, want)


def test_rows_do_not_influence_each_other():
    memory, x = layer(), sequence()
    changed = x.clone()
    changed[1] += 1.0
    torch.testing.assert_close(memory(changed)[0][0], memory(x)[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["default", "mlp"])
@pytest.mark.parametrize("aged", [False, True])
def test_padding_changes_nothing(variant, aged):
    memory, x, lengths = layer(variant), sequence(4), torch.tensor([14, 9, 4, 0])
    before = memory(sequence(4, 6))[1] if aged else None
    y, state = memory(x, before, lengths)
    noise = x.clone()
    for row, n in enumerate(lengths.tolist()):
        noise[row, n:] = 1e3 * torch.randn_like(noise[row, n:])
    assert_states_equal(memory(noise, before, lengths)[1], state)
    assert y.isfinite().all()
    follow = sequence(4, 5)
    after = memory(follow, state)[0]
    for row, n in enumerate(lengths.tolist()):
        past = None if before is None else select_rows(before, [row])
        alone, own = memory(x[row : row + 1, :n], past)
        torch.testing.assert_close(y[row : row + 1, :n], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(memory(follow[row : row + 1], own)[0], after[row : row + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, [14, 9, 0]])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_blocks_of_a_long_sequence_change_nothing(size, lengths, monkeypatch):
    """The layer's own arithmetic in blocks of so many tokens: outputs, state and gradients of the whole."""
    memory, x = layer(), sequence(rows=3)
    begun = detach(stack_rows([memory(sequence(1, age))[1] for age in (0, 2, 7)], [1] * 3))
    lengths = lengths and torch.tensor(lengths)
    real = torch.ones(3, 14, 1) if lengths is None else (torch.arange(14) < lengths[:, None])[..., None]

    def results():
        memory.zero_grad()
        inputs = x.clone().requires_grad_()
        y, state = memory(inputs, begun, lengths)
        ((y * real).square().sum() + sum(e.sum() for e in state.running)).backward()
        return [y * real, *tensors(state), inputs.grad, *(p.grad.clone() for p in memory.parameters())]

    want = results()
    monkeypatch.setattr(projections, "BLOCK", size * 3 * 16)
    for a, b in zip(results(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_initial_state_gets_an_outer_gradient(variant):
    memory = SelfModifyingTitans(32, 2, chunk_size=16, **VARIANTS[variant])
    y, _ = memory(torch.randn(2, 149, 32))
    (y * torch.randn_like(y)).sum().backward()
    norms = {name: p.grad.norm().item() for name, p in memory.named_parameters()}
    assert all(norm > 0 for norm in norms.values()), norms
    floor = 1e-4 * sorted(norms.values())[len(norms) // 2]
    for matrix in memory.initial:
        for m, name in enumerate(memory.names):
            assert matrix.grad[:, m].norm() > floor, name


def test_every_parameter_learns_from_149_tokens_at_the_default_chunk_size():
    memory = SelfModifyingTitans(64, 2)
    y, _ = memory(torch.randn(1, 149, 64))
    (y * torch.randn_like(y)).sum().backward()
    for name, p in memory.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("memory", ["features", "linear", "mlp"])
def test_twenty_thousand_tokens_stay_finite_at_initialisation(memory):
    with torch.no_grad():
        titans, state = SelfModifyingTitans(16, 2, memory=memory), None
        for _ in range(10):
            y, state = titans(torch.randn(1, 2000, 16), state)
            assert y.isfinite().all()
    assert all(x.isfinite().all() and x.abs().max() < 1e3 for x in (*state.anchor, *state.running))
    assert state.count.item() == 20000 % titans.chunk_size


def test_half_lives():
    """The read memory halves its distance to the initial state in 2,048 tokens by default; levels() says so."""
    memory = layer(chunk_size=1)
    assert memory.half_lives()["memory"] == pytest.approx(2048)
    assert {level.name: level.half_life for level in memory.levels()}["memory"] >= 1024
    with torch.no_grad():
        memory.gate_weight.zero_()
        memory.eta_bias.fill_(-800.0)  # nothing is written
        _, state = memory(sequence(1, 1))
        state = detach(state)
        start = torch.ones_like(state.running[0])
        _, state = memory(sequence(1, 100), replace(state, anchor=[start], running=[start]))
    for m, name in enumerate(memory.names):
        want = 0.5 ** (100 / memory.half_lives()[name])
        torch.testing.assert_close(state.running[0][:, :, m], start[:, :, m] * want, rtol=1e-6, atol=0)


def test_levels_declare_what_is_there():
    memory = layer(chunk_size=4)
    levels = memory.levels()
    assert [level.name for level in levels] == ["k", "v", "eta", "alpha", "memory"]
    assert sum(level.parameters for level in levels) == sum(p.numel() for p in memory.initial)
    assert {level.period for level in levels[:4]} == {4} and levels[4].period == 1
    assert {level.period for level in layer("anchor").levels()} == {4}
    single = SelfModifyingTitans(16, 2, chunk_size=4)
    for tokens in (1, 11, 12):
        _, state = single(torch.randn(3, tokens, 16))
        assert sum(level.state_bytes for level in levels) * 3 == nbytes(state)


def test_generators_change_only_at_chunk_borders():
    memory, x, state, states = layer(chunk_size=4), sequence(1, 9), None, []
    for t in range(9):
        _, state = memory(x[:, t : t + 1], state)
        states.append(state)
    moved = [t + 1 for t in range(1, 9) if not torch.equal(states[t].anchor[0], states[t - 1].anchor[0])]
    assert moved == [4, 8]
    for t in range(1, 9):
        assert not torch.equal(states[t].running[0], states[t - 1].running[0])
        assert torch.equal(states[t].running[0], states[t].anchor[0]) == (t + 1 in moved)


def test_autocast_keeps_the_memory_in_float32():
    memory, x = SelfModifyingTitans(16, 2, chunk_size=4), torch.randn(2, 10, 16)
    exact, _ = memory(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = memory(x)
        y, state = memory(x, state)
    assert {d.dtype for d in (*state.anchor, *state.running)} == {torch.float32}
    assert y.isfinite().all()
    assert (memory(x)[0] - exact).abs().max() == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_writes_need_no_gradient(context):
    memory, x = layer(), sequence()
    want = memory(x)[0].detach()
    with context():
        first, state = memory(x[:, :6])
        second, state = memory(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=1e-10, atol=1e-12)
    assert all(not t.requires_grad for t in tensors(state))


def test_state_copies_and_passes_through_its_flat_form():
    memory, x = layer(), sequence()
    _, state = memory(x)
    state = detach(state)
    again = unflatten(*flatten(state))
    for other in (again, copy.deepcopy(state)):
        assert torch.equal(memory(x, other)[0], memory(x, state)[0])


def test_forward_changes_no_attribute():
    memory = layer()
    before = {name: p.clone() for name, p in memory.state_dict().items()}
    names = set(vars(memory))
    memory(sequence())
    assert set(vars(memory)) == names
    assert all(torch.equal(p, before[name]) for name, p in memory.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "not divisible"),
        ({"heads": 2, "memory": "attention"}, "use one of"),
        ({"heads": 2, "chunk_size": 0}, "chunk_size"),
        ({"heads": 2, "expansion": 2, "memory": "linear"}, "expansion"),
        ({"heads": 2, "half_life": 0}, "half_life"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfModifyingTitans(16, **options)


def test_a_convolution_can_be_given_and_one_token_wide_it_carries_nothing():
    memory = SelfModifyingTitans(16, 2, chunk_size=4, convolution=ShortConvolution(16, 1, activation=False)).double()
    x = sequence()
    whole, want = memory(x)
    first, state = memory(x[:, :5])
    rest, state = memory(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-10, atol=1e-12)
    assert_states_equal(state, want)
    assert state.tail.numel() == 0 and sum(p.numel() for p in memory.conv.parameters()) == 16
    with pytest.raises(ValueError, match="convolution has dim=8"):
        SelfModifyingTitans(16, 2, convolution=ShortConvolution(8))


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="needs"):
        layer()(torch.zeros(2, 3, 8, dtype=torch.float64))


def test_half_life_is_where_alpha_is_one_half():
    bias = SelfModifyingTitans(16, 2, half_life=100).alpha_bias[0]
    assert bias.sigmoid().item() ** 100 == pytest.approx(0.5, rel=1e-4)
    assert math.isfinite(bias.item())
