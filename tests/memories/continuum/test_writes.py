"""Each inner rule against its equation written out, on one linear level; and the general write on other modules."""

import math

import pytest
import torch
from torch import nn

import nestling
from nestling.memories.continuum import (
    AdamLike,
    ContinuumLevel,
    ContinuumMemory,
    FastLinear,
    FastMatrix,
    InnerRule,
    Momentum,
    checkpointed,
    fast_weights,
    reading,
)
from nestling.testing import assert_close

PERIOD, WIDTH, WRITES = 3, 4, 3
DOUBLE = torch.float64


def level(**rule):
    made = ContinuumLevel(FastLinear(WIDTH, WIDTH, metric=True), period=PERIOD, rule=InnerRule(**rule)).double()
    return made, made.body


def errors(net, piece):
    """Regression: the first half of the channels to the second."""
    return 0.5 * (net(piece[..., :WIDTH]) - piece[..., WIDTH:]).square().sum(-1)


def periods(rows=2):
    return torch.randn(rows, PERIOD * WRITES, 2 * WIDTH, dtype=DOUBLE)


def by_hand(net, weight, data, write):
    """Row by row: mean gradient of each period at W + D, then D <- write(D, gradient, inputs)."""
    deltas = []
    for row in data:
        delta, memory = torch.zeros_like(weight), {}
        for part in row.split(PERIOD):
            x, goal = part.split(WIDTH, -1)
            gradient = ((x @ (weight + delta).T - goal).T @ x) / PERIOD
            delta = write(delta, gradient, x, memory)
        deltas.append(delta)
    return torch.stack(deltas)


def unit_moment(x):
    keys = x / x.norm(dim=-1, keepdim=True)
    return keys.T @ keys / len(x)


def momentum(delta, g, x, memory):
    memory["m"] = 0.9 * memory.get("m", 0) + g
    return delta - 0.1 * memory["m"]


def adam(delta, g, x, memory):
    memory["t"] = t = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g * g
    return delta - 0.1 * (memory["m"] / (1 - 0.9**t)) / ((memory["v"] / (1 - 0.95**t)).sqrt() + 1e-8)


PLAIN = {"rate": 0.1, "relative": False, "kappa": 0.0, "bound": math.inf}
CASES = {
    "sgd": (PLAIN, lambda d, g, x, _: d - 0.1 * g),
    "decay": ({**PLAIN, "decay": 0.3}, lambda d, g, x, _: 0.7 * d - 0.1 * g),
    "erase": ({**PLAIN, "erase": 0.6}, lambda d, g, x, _: d @ (torch.eye(WIDTH) - 0.6 * unit_moment(x)) - 0.1 * g),
    "momentum": ({**PLAIN, "direction": Momentum()}, momentum),
    "adam": ({**PLAIN, "direction": AdamLike()}, adam),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_is_its_equation(case):
    options, write = CASES[case]
    net, map_ = level(**options)
    rate = net.inner_log_rate.exp().item() / 0.1  # the rate is kept in float32
    data = periods()
    state = nestling.learn(net, errors, data)[""]
    expected = by_hand(net, map_.weight.detach(), data, lambda d, g, x, m: write(d, g, x, m))
    assert rate == pytest.approx(1, rel=1e-6)
    assert_close(state.delta[""].to_dense().detach(), expected, case, 1e-6)
    assert state.writes.tolist() == [WRITES, WRITES]


def test_relative_writes_have_their_length_and_the_bound_holds():
    for rate, bound, length in ((0.02, 0.1, 0.02), (0.5, 0.1, 0.1)):
        net, map_ = level(rate=rate, bound=bound, kappa=0.0)
        size, data = map_.weight.detach().norm(), periods(1)
        expected = by_hand(
            net, map_.weight.detach(), data, lambda d, g, x, _, s=size, n=length: d - n * s * g / g.norm()
        )
        state = nestling.learn(net, errors, data)[""]
        assert_close(state.delta[""].to_dense().detach(), expected, f"rate {rate}", 1e-6)
        assert state.norm.tolist() == pytest.approx([length], rel=1e-5)


def test_the_old_key_metric_is_its_equation_and_spares_old_keys():
    net, map_ = level(rate=0.1, relative=False, kappa=5.0, bound=math.inf)
    old = torch.randn(200, WIDTH, dtype=DOUBLE) * torch.tensor([10.0, 1.0, 1.0, 0.1], dtype=DOUBLE)
    map_.remember(old.T @ old / 200, kappa=5.0, keep=0.0)
    covariance = old.T @ old / 200
    covariance = covariance / covariance.diagonal().mean()
    metric = torch.linalg.inv(torch.eye(WIDTH, dtype=DOUBLE) + 5.0 * covariance)
    data = periods(1)
    expected = by_hand(net, map_.weight.detach(), data, lambda d, g, x, _: d - 0.1 * g @ metric)
    delta = nestling.learn(net, errors, data)[""].delta[""].to_dense().detach()
    assert_close(delta, expected, "metric", 1e-6)
    assert float(delta[0, :, 0].norm()) < 0.3 * float(delta[0, :, 3].norm())


def test_what_was_not_predicted_stays_finite():
    """A zero gradient of a heavy weight in float32: rate * size / tiny would be infinite, and times zero NaN."""
    net = ContinuumLevel(FastLinear(WIDTH, WIDTH), period=PERIOD, rule=InnerRule(rate=0.5, kappa=0.0))
    with torch.no_grad():
        net.body.weight.mul_(1e4)
    state = nestling.learn(net, lambda net, piece: 0.0 * net(piece).sum(-1), torch.randn(1, 6, WIDTH))[""]
    assert state.writes.tolist() == [2] and not state.delta[""].to_dense().any()


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_factored_and_dense_fast_matrices_agree(tokens):
    left, right = torch.randn(2, tokens, 5, dtype=DOUBLE), torch.randn(2, tokens, 4, dtype=DOUBLE)
    factored, dense = FastMatrix(left=left, right=right), FastMatrix(dense=left.mT @ right)
    scale, x, keys = torch.rand(2, dtype=DOUBLE), torch.randn(2, 6, 4, dtype=DOUBLE), torch.randn(2, 3, 4, dtype=DOUBLE)
    moment = FastMatrix(left=keys, right=keys)
    for name, call in {
        "times": lambda m: m.times(scale).to_dense(),
        "norm": lambda m: m.norm(),
        "apply": lambda m: m.apply(x),
        "erase": lambda m: m.erase(moment, scale).to_dense(),
        "erase, dense keys": lambda m: m.erase(FastMatrix(dense=moment.to_dense()), scale).to_dense(),
        "plus factors": lambda m: m.plus(FastMatrix(left=left, right=right), scale).to_dense(),
        "plus dense": lambda m: m.plus(FastMatrix(dense=dense.dense), -scale).to_dense(),
        "metric": lambda m: m.times_matrix(moment.to_dense()).to_dense(),
    }.items():
        assert_close(call(factored), call(dense), name, 1e-10)
    merged = factored.plus_outer(left, right)
    assert (merged.dense is None) == (2 * tokens * 9 < 20)
    assert_close(merged.to_dense(), 2 * dense.to_dense(), "merged", 1e-12)


def test_a_merged_delta_is_read_and_written_by_short_segments():
    """Segments too short for a gradient as a matrix, after so many writes that the delta is one."""
    width, tokens, writes = 96, 20, 5
    made = ContinuumLevel(FastLinear(width, width), period=tokens, rule=InnerRule(**PLAIN)).double()
    data = torch.randn(2, tokens * writes, 2 * width, dtype=DOUBLE)
    state = nestling.learn(
        made, lambda net, piece: 0.5 * (net(piece[..., :width]) - piece[..., width:]).square().sum(-1), data
    )
    delta = state[""].delta[""]
    assert delta.dense is not None
    rate = made.inner_log_rate.exp().item()
    for row, got in zip(data, delta.to_dense(), strict=True):
        expected = torch.zeros_like(made.body.weight)
        for part in row.split(tokens):
            x, goal = part.split(width, -1)
            expected = expected - rate * ((x @ (made.body.weight + expected).T - goal).T @ x) / tokens
        assert_close(got, expected.detach(), "delta", 1e-10)


class Net(nn.Module):
    """A regression net: not a language model, not text."""

    def __init__(self, **options):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.memory = ContinuumMemory(6, periods=(2, 4, math.inf), hidden=9, **options)

    def forward(self, x):
        return self.down(self.memory(self.up(x))[0])


def test_learn_in_any_split_any_mode_and_without_touching_parameters():
    net, data = Net().double(), torch.randn(2, 11, 2 * WIDTH, dtype=DOUBLE)
    before = [p.clone() for p in net.parameters()]
    whole = nestling.learn(net, errors, data)
    with torch.inference_mode():
        state = None
        for part in (data[:, :1], data[:, 1:6], data[:, 6:]):
            state = nestling.learn(net, errors, part.clone(), state)
    for path, s in whole.items():
        assert s.writes.tolist() == state[path].writes.tolist() == [11 // 2 if path.endswith("0") else 11 // 4] * 2
        for name, delta in s.delta.items():
            assert_close(state[path].delta[name].to_dense(), delta.to_dense(), f"{path}.{name}", 1e-9)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    with torch.no_grad(), fast_weights(net, whole):
        bent = net(data[..., :WIDTH])
    assert float((bent - net(data[..., :WIDTH]).detach()).abs().max()) > 1e-4


def test_each_level_gets_its_own_error():
    """The write of every weight is autograd's gradient of the task loss; the last level's error would be wrong."""
    rule = InnerRule(rate=1.0, relative=False, kappa=0.0, bound=math.inf)
    net, data = Net(rules=rule).double(), torch.randn(1, 4, 2 * WIDTH, dtype=DOUBLE)
    slow = net.memory.stack[1].body
    for row in data:
        loss = errors(net, row[None]).sum() / 4
        expected = torch.autograd.grad(loss, [slow.up.weight, slow.down.weight])
    frozen_fast = Net(rules=[InnerRule(rate=0.0, kappa=0.0), rule, rule]).double()
    frozen_fast.load_state_dict(net.state_dict(), strict=False)
    state = nestling.learn(frozen_fast, errors, data)["memory.stack.1"]
    for name, grad in zip(("up", "down"), expected, strict=True):
        assert_close(-state.delta[name].to_dense()[0].detach(), grad, name, 1e-6)


def test_checkpointing_remembers_the_fast_weights():
    net, data = Net().double(), torch.randn(2, 20, 2 * WIDTH, dtype=DOUBLE)
    state = nestling.learn(net, errors, data)
    found = []
    for forward in (net, lambda x: checkpointed(net, x)):
        net.zero_grad()
        with fast_weights(net, state):
            loss = (forward(data[..., :WIDTH]) - data[..., WIDTH:]).square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, "gradient", 1e-12)


def test_learn_says_what_is_missing():
    with pytest.raises(ValueError, match="no ContinuumMemory"):
        nestling.learn(nn.Linear(3, 3), lambda net, x: net(x).sum(-1), torch.randn(1, 4, 3))
    with pytest.raises(ValueError, match="return the loss per row"):
        nestling.learn(Net().double(), lambda net, x: errors(net, x).mean(), torch.randn(2, 4, 8, dtype=DOUBLE))
    for options, says in (({"rate": -1.0}, "rate"), ({"erase": 2.0}, "erase"), ({"rate": 0.0, "learned": True}, "log")):
        with pytest.raises(ValueError, match=says):
            InnerRule(**options)


def test_outside_a_reading_a_fast_linear_is_a_linear():
    map_, x = FastLinear(3, 2, bias=True), torch.randn(4, 5, 3)
    plain = torch.nn.functional.linear(x, map_.weight, map_.bias)
    assert torch.equal(map_(x), plain)
    from nestling.memories.continuum import Reading

    with reading(Reading({})):
        assert torch.equal(map_(x), plain)
