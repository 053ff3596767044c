"""Continuum memory (paper section 7): limits, variants, and every inner rule against its equation."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nestling
from nestling.memories.continuum import (
    AdamLike,
    ContinuumMemory,
    FastMatrix,
    GatedMLP,
    IndependentContinuumMemory,
    InnerRule,
    Momentum,
    MuonLike,
    NestedContinuumMemory,
    fast_weights,
)
from nestling.models import build
from nestling.ops.newton_schulz.reference import newton_schulz
from nestling.testing import assert_close

INF = math.inf


def small(name: str, **changes):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return build(name, vocab_size=40, dim=16, depth=2, heads=2, **changes).double()


def tokens(rows: int = 2, length: int = 37) -> Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(3))


def squares(model: torch.nn.Module, x: Tensor) -> Tensor:
    """A loss per row and token that needs no target."""
    return (model(x)[0] - x.roll(1, -1)).square().sum(-1) / 2


# --- limits ------------------------------------------------------------------------------------------------------


def test_hope_attention_with_one_frozen_level_is_the_transformer() -> None:
    hope, transformer = small("hope-attention", periods=(INF,)), small("transformer")
    transformer.load_state_dict({n: w for n, w in hope.state_dict().items() if n in transformer.state_dict()})
    assert torch.equal(hope(tokens()).logits, transformer(tokens()).logits)


def test_a_frozen_level_is_a_plain_mlp_block() -> None:
    torch.manual_seed(0)
    memory = ContinuumMemory(8, periods=(INF,), hidden=12).double()
    mlp, x = memory.stack[0].body, torch.randn(2, 5, 8, dtype=torch.float64)
    gate, up = (F.rms_norm(x, (8,), mlp.norm.weight, 1e-6) @ mlp.up.weight.T).chunk(2, -1)
    assert_close(memory(x)[0], x + (F.silu(gate) * up) @ mlp.down.weight.T, "frozen level")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rate_zero_is_the_static_model(dtype: torch.dtype) -> None:
    model = small("hope-attention", periods=(8, 16), inner_lr=0.0).to(dtype)
    learning = model(tokens(length=64))
    state, pieces = None, []
    for piece in tokens(length=64).split(8, 1):
        out = model(piece, state, learn=False)
        state, pieces = out.state, [*pieces, out.logits]
    assert learning.state.writes.tolist() == [[7, 3]] * 2
    assert torch.equal(learning.logits, torch.cat(pieces, 1))  # the same segments: equal bits
    whole = model(tokens(length=64), learn=False).logits
    bound = 1e-10 if dtype == torch.float64 else 2e-6
    assert (learning.logits - whole).abs().max() <= bound * max(1.0, float(whole.detach().abs().max()))


# --- variants ----------------------------------------------------------------------------------------------------


def test_nested_levels_start_again_when_the_slower_one_writes() -> None:
    torch.manual_seed(0)
    memory = NestedContinuumMemory(8, periods=(4, 12), hidden=12, rules=InnerRule(rate=0.1, kappa=0)).double()
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    fast: list[float] = []
    state = None
    for piece in x.split(4, 1):
        state = nestling.learn(memory, squares, piece, state)
        delta = state["stack.0"].delta
        fast.append(max((m.to_dense().abs().max().item() for m in delta.values()), default=0.0))
    assert [size > 0 for size in fast] == [True, True, False, True, True, False, True, True]
    assert fast[2] == fast[5] == 0.0  # exactly the initial weights, after three writes each
    assert int(state["stack.0"].writes) == 7 and int(state["stack.1"].writes) == 2


def test_independent_with_one_hot_weights_is_that_mlp() -> None:
    torch.manual_seed(0)
    memory = IndependentContinuumMemory(8, periods=(4, INF), hidden=12).double()
    memory.weights.data = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_close(memory(x)[0], x + memory.stack[1](x), "one-hot aggregate")


def test_sequential_levels_are_a_chain_and_the_order_is_an_option() -> None:
    torch.manual_seed(0)
    memory = ContinuumMemory(8, periods=(4, 8), hidden=12).double()
    back = ContinuumMemory(8, periods=(4, 8), hidden=12, slow_first=True).double()
    back.load_state_dict(memory.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    fast, slow = memory.stack
    once = x + fast(x)
    assert_close(memory(x)[0], once + slow(once), "fast first")
    once = x + slow(x)
    assert_close(back(x)[0], once + fast(once), "slow first")


# --- inner rules, each against its equation ----------------------------------------------------------------------

PERIOD, WRITES, RATE = 4, 3, 0.05


def by_hand(memory: ContinuumMemory, x: Tensor, rule: InnerRule) -> dict[str, Tensor]:
    """W + D after WRITES writes of one row, by autograd on plain weights; rates are absolute, the metric is off."""
    body: GatedMLP = memory.stack[0].body  # type: ignore[assignment]
    rate = float(memory.stack[0].inner_log_rate.exp())  # kept as a logarithm in float32
    start = {"up": body.up.weight.detach(), "down": body.down.weight.detach()}
    delta = {name: torch.zeros_like(w) for name, w in start.items()}
    moment = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in start.items()}
    for step, piece in enumerate(x.split(PERIOD, 1)[:WRITES], start=1):
        now = {name: (start[name] + delta[name]).requires_grad_() for name in start}
        inputs = {"up": F.rms_norm(piece, (x.shape[-1],), body.norm.weight, 1e-6)}
        gate, up = (inputs["up"] @ now["up"].T).chunk(2, -1)
        inputs["down"] = F.silu(gate) * up
        y = piece + inputs["down"] @ now["down"].T
        loss = ((y - piece.roll(1, -1)).square().sum(-1) / 2).mean()  # the mean over the period
        for name, g in zip(now, torch.autograd.grad(loss, list(now.values())), strict=True):
            direction = g
            if isinstance(rule.direction, Momentum):
                moment[name][0] = rule.direction.beta * moment[name][0] + g
                direction = moment[name][0]
            if isinstance(rule.direction, AdamLike):
                b1, b2 = rule.direction.beta1, rule.direction.beta2
                moment[name] = [b1 * moment[name][0] + (1 - b1) * g, b2 * moment[name][1] + (1 - b2) * g * g]
                m, v = moment[name][0] / (1 - b1**step), moment[name][1] / (1 - b2**step)
                direction = m / (v.sqrt() + rule.direction.eps)
            if isinstance(rule.direction, MuonLike):
                moment[name][0] = rule.direction.beta * moment[name][0] + g
                direction = newton_schulz(moment[name][0])
            keys = F.normalize(inputs[name].detach().flatten(0, 1), dim=-1)
            erased = delta[name] - rule.erase * delta[name] @ (keys.T @ keys / PERIOD)
            delta[name] = (1 - rule.decay) * erased - rate * direction
    return delta


@pytest.mark.parametrize(
    "rule",
    [
        InnerRule(rate=RATE),
        InnerRule(rate=RATE, direction=Momentum(0.7)),
        InnerRule(rate=RATE, direction=AdamLike()),
        InnerRule(rate=RATE, direction=MuonLike(0.7)),
        InnerRule(rate=RATE, erase=0.5),
        InnerRule(rate=RATE, decay=0.1),
        InnerRule(rate=RATE, erase=0.3, decay=0.2, direction=Momentum()),
    ],
    ids=["gradient", "momentum", "adam", "muon", "erase", "decay", "all"],
)
@pytest.mark.parametrize("hidden", [2, 40], ids=["dense", "factored"])
def test_every_inner_rule_is_its_equation(rule: InnerRule, hidden: int) -> None:
    rule = replace(rule, relative=False, kappa=0.0, bound=1e9)
    torch.manual_seed(0)
    memory = ContinuumMemory(24, periods=(PERIOD,), hidden=hidden, rules=rule).double()
    x = torch.randn(1, PERIOD * WRITES, 24, dtype=torch.float64)
    state = nestling.learn(memory, squares, x)["stack.0"]
    for name, expected in by_hand(memory, x, rule).items():
        assert_close(state.delta[name].to_dense()[0], expected, f"delta of {name}", rtol=1e-9)


def test_the_old_key_metric_turns_the_write_away_from_old_inputs() -> None:
    kappa, dim = 7.0, 12
    metric = InnerRule(rate=RATE, relative=False, kappa=kappa, bound=1e9)
    torch.manual_seed(0)
    memory = ContinuumMemory(dim, periods=(PERIOD,), hidden=6, rules=metric).double()
    old = torch.randn(50, dim, dtype=torch.float64) * torch.linspace(0.1, 3, dim, dtype=torch.float64)
    moment = old.T @ old / len(old)
    memory.stack[0].body.up.remember(moment, kappa=kappa, keep=0.0)
    x = torch.randn(1, PERIOD, dim, dtype=torch.float64)
    scaled = moment / moment.diagonal().mean()
    inverse = torch.linalg.inv(torch.eye(dim, dtype=torch.float64) + kappa * scaled)
    expected = by_hand_first_write(memory, x) @ inverse
    made = nestling.learn(memory, squares, x)["stack.0"].delta["up"].to_dense()[0]
    assert_close(made, expected, "metric write", rtol=1e-9)


def test_online_old_keys_join_when_the_slowest_level_writes() -> None:
    """From the slowest level's write on C is the mean of C on training text and C on what was read."""
    kappa, dim, slow = 7.0, 12, 2 * PERIOD
    rule = InnerRule(rate=RATE, relative=False, kappa=kappa, bound=1e9, online=True)
    torch.manual_seed(0)
    memory = ContinuumMemory(dim, periods=(PERIOD, slow), hidden=12, rules=rule).double()
    fast, eye = memory.stack[0], torch.eye(dim, dtype=torch.float64)
    old = torch.randn(50, dim, dtype=torch.float64) * torch.linspace(0.1, 3, dim, dtype=torch.float64)
    fast.body.up.remember(old.T @ old / len(old), kappa=kappa, keep=0.0)
    x = torch.randn(1, slow + PERIOD, dim, dtype=torch.float64)
    keys = F.rms_norm(x, (dim,), fast.body.norm.weight, 1e-6).detach()[0]  # what the first map of the first level sees

    def covariance(inputs: Tensor) -> Tensor:
        moment = inputs.T @ inputs
        return moment / moment.diagonal().mean()

    only_old, with_read = covariance(old), (covariance(old) + covariance(keys[:slow])) / 2
    state, written = None, torch.zeros((), dtype=torch.float64)
    for start, C in ((0, only_old), (PERIOD, only_old), (slow, with_read)):
        piece = x[:, start : start + PERIOD]
        with fast_weights(memory, state) if state else nullcontext():
            step = by_hand_first_write(memory, piece)
        state = nestling.learn(memory, squares, piece, state)
        made = state["stack.0"].delta["up"].to_dense()[0]
        assert_close(made - written, step @ torch.linalg.inv(eye + kappa * C), f"write at {start}", rtol=1e-9)
        written = made


def by_hand_first_write(memory: ContinuumMemory, x: Tensor) -> Tensor:
    """What the first write adds to the first map."""
    weight = memory.stack[0].body.up.weight
    (gradient,) = torch.autograd.grad(squares(memory, x).mean(), [weight])
    return -memory.stack[0].inner_log_rate.detach().exp() * gradient


def test_no_write_is_longer_than_its_bound() -> None:
    torch.manual_seed(0)
    memory = ContinuumMemory(8, periods=(PERIOD,), hidden=6, rules=InnerRule(rate=50.0, bound=0.05, kappa=0)).double()
    state = nestling.learn(memory, squares, torch.randn(2, PERIOD, 8, dtype=torch.float64))["stack.0"]
    for name, delta in state.delta.items():
        size = memory.stack[0].maps[name].weight.norm()
        assert_close(delta.norm(), (0.05 * size).expand(2), f"length of the write to {name}")


def test_factored_and_dense_matrices_are_the_same_matrix() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(2, 3, 11, dtype=torch.float64)
    factored = FastMatrix().plus_outer(left, right)
    dense = FastMatrix(dense=left.transpose(1, 2) @ right)
    assert factored.dense is None and dense.left is None
    other, x = torch.randn(11, 11, dtype=torch.float64), torch.randn(2, 4, 11, dtype=torch.float64)
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for name, a, b in (
        ("norm", factored.norm(), dense.norm()),
        ("apply", factored.apply(x), dense.apply(x)),
        ("times", factored.times(scale).to_dense(), dense.times(scale).to_dense()),
        ("matrix", factored.times_matrix(other).to_dense(), dense.times_matrix(other).to_dense()),
        ("plus", factored.plus(dense, scale).to_dense(), dense.to_dense() * (1 + scale.view(-1, 1, 1))),
    ):
        assert_close(a, b, name)
    merged = factored
    for _ in range(3):
        merged = merged.plus_outer(left, right)
    assert merged.left is None  # as soon as factors would be larger than the matrix
    assert_close(merged.to_dense(), 4 * dense.to_dense(), "merged")


# --- any module, any input ---------------------------------------------------------------------------------------


def test_learn_writes_each_sequence_on_its_own_and_leaves_the_module_alone() -> None:
    torch.manual_seed(0)
    memory = ContinuumMemory(8, periods=(PERIOD, 8), hidden=12, rules=InnerRule(rate=0.1)).double()
    before = {n: w.clone() for n, w in memory.state_dict().items()}
    x = torch.randn(3, 21, 8, dtype=torch.float64)
    state = nestling.learn(memory, squares, x)
    assert all(torch.equal(w, before[n]) for n, w in memory.state_dict().items())
    assert state["stack.0"].writes.tolist() == [5] * 3 and state["stack.1"].writes.tolist() == [2] * 3
    alone = nestling.learn(memory, squares, x[1:2])
    assert_close(state["stack.0"].delta["up"].to_dense()[1:2], alone["stack.0"].delta["up"].to_dense(), "row 1")
    halves = nestling.learn(memory, squares, x[:, 9:], nestling.learn(memory, squares, x[:, :9]))
    assert_close(halves["stack.1"].delta["down"].to_dense(), state["stack.1"].delta["down"].to_dense(), "two calls")
    with fast_weights(memory, state):
        inside = squares(memory, x).mean()
    assert inside < squares(memory, x).mean()
