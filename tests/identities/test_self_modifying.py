"""What self-modifying Titans reduce to (paper §8.1-8.2): recurrence (88), fixed points, DeltaNet, static memory."""

import pytest
import torch

from nestling.ops.self_modifying import Rule, chunk, reference

WIDTH = 4


def double(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def linear_call(z, q, weights, *, eta, alpha, rates=None, form=chunk, **options):
    """Linear memories, one head, with gates fixed at the given logits."""
    bias = torch.tensor([[eta], [alpha]], dtype=torch.float64)
    rates = torch.ones(1, 5, dtype=torch.float64) if rates is None else rates
    y, (_, state) = form.self_modifying(
        z[:, :, None], q[:, :, None], (weights,), torch.zeros(2, 1, WIDTH, dtype=torch.float64), bias, rates, **options
    )
    return y[:, :, 0], state


def only_the_read_memory():
    """Rates at which the generators stay at their initial states: given keys and values."""
    return torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)


def delta_rule(keys, values, queries, M, beta):
    """DeltaNet, read before the write, from M (in, out)."""
    read = []
    for k, v, q in zip(keys, values, queries, strict=True):
        read.append(q @ M)
        M = M - beta * torch.outer(k, k @ M - v)
    return torch.stack(read), M


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_chunk_size_one_is_the_token_recurrence(objective):
    """(83)-(88), (92), (93) written out for linear memories, literal options, autograd for the inner gradient."""
    z, q, weights = double(1, 9, WIDTH), unit(double(1, 9, WIDTH)), double(1, 5, WIDTH, WIDTH)
    eta_max, alpha = 0.5, torch.tensor(3.0, dtype=torch.float64).sigmoid()
    rule = Rule(objective=objective, erase="undecayed", decay_to="zero", self_values=True, eta_max=eta_max)
    y, state = linear_call(z, q, weights, eta=0.0, alpha=3.0, rule=rule, chunk_size=1)

    M = {name: weights[0, m].T for m, name in enumerate(("k", "v", "eta", "alpha", "memory"))}  # paper layout
    want, eta, eye = [], eta_max / 2, torch.eye(WIDTH, dtype=torch.float64)
    for t in range(9):
        k, v = unit(M["k"] @ z[0, t]), unit(M["v"] @ z[0, t])
        want.append(M["memory"] @ q[0, t])
        new = {}
        for name, matrix in M.items():
            value = unit(matrix @ v)
            leaf = matrix.detach().requires_grad_()
            loss = -(leaf @ k) @ value if objective == "dot" else 0.5 * (leaf @ k - value).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            new[name] = matrix @ (alpha * eye - eta * torch.outer(k, k)) - eta * gradient
        M = new
    torch.testing.assert_close(y[0], torch.stack(want), rtol=1e-4, atol=1e-5)  # the library's norm has eps 1e-6
    final = torch.stack([matrix.T for matrix in M.values()]) - weights[0]
    torch.testing.assert_close(state[0, 0], final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("objective", "limit"), [("dot", 1.0), ("l2", 0.5)])
def test_repeated_writes_reach_the_fixed_point(objective, limit):
    """One pair for ever, alpha = 1: the dot form stores v, the literal L2 form v/2 because it erases twice."""
    z, weights = double(1, 1, WIDTH).expand(1, 400, WIDTH), double(1, 5, WIDTH, WIDTH)
    rule = Rule(objective=objective, eta_max=0.5)
    _, state = linear_call(z, z, weights, eta=0.0, alpha=40.0, rates=only_the_read_memory(), rule=rule, chunk_size=1)
    k, v = unit(z[0, 0] @ weights[0, 0]), unit(z[0, 0] @ weights[0, 1])
    torch.testing.assert_close(k @ (weights[0, 4] + state[0, 0, 4]), limit * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("objective", "erased"), [("dot", 1), ("l2", 2)])
def test_read_after_one_write(objective, erased):
    """At the key: (alpha - eta) M k + eta v, twice eta in the L2 form; across it: alpha M."""
    z, weights = double(1, 1, WIDTH), double(1, 5, WIDTH, WIDTH)
    rule = Rule(objective=objective, erase="undecayed", decay_to="zero", eta_max=0.4)
    _, state = linear_call(z, z, weights, eta=0.0, alpha=1.0, rates=only_the_read_memory(), rule=rule, chunk_size=1)
    k, v = unit(z[0, 0] @ weights[0, 0]), unit(z[0, 0] @ weights[0, 1])
    before, after, eta = weights[0, 4], weights[0, 4] + state[0, 0, 4], 0.2
    alpha = torch.tensor(1.0, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(k @ after, (alpha - erased * eta) * (k @ before) + eta * v, rtol=1e-5, atol=1e-5)
    across = unit(double(WIDTH))
    across = across - (across @ k) * k
    torch.testing.assert_close(across @ after, alpha * (across @ before), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"objective": "dot"}, {"objective": "l2", "erase": "none"}])
def test_without_decay_and_with_given_values_it_is_delta_net(options):
    """alpha = 1, v given: the dot form with its erase, and the L2 form without it, are the delta rule."""
    z, q, weights = double(1, 20, WIDTH), unit(double(1, 20, WIDTH)), double(1, 5, WIDTH, WIDTH)
    size = 8 if options["objective"] == "dot" else 1  # the L2 gradient is taken at the anchor: online at chunk size 1
    y, state = linear_call(
        z,
        q,
        weights,
        eta=0.0,
        alpha=40.0,
        rates=only_the_read_memory(),
        rule=Rule(**options, eta_max=0.8),
        chunk_size=size,
    )
    made = [
        x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (z[0] @ weights[0, 0], z[0] @ weights[0, 1])
    ]
    want, final = delta_rule(*made, q[0], weights[0, 4], 0.4)
    torch.testing.assert_close(y[0], want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights[0, 4] + state[0, 0, 4], final, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("read", ["causal", "anchor"])
def test_nothing_written_is_a_static_layer(read):
    """eta = 0, alpha = 1: y = M_memory,0(q) and no memory moves."""
    z, q, weights = double(2, 10, WIDTH), unit(double(2, 10, WIDTH)), double(1, 5, WIDTH, WIDTH)
    y, state = linear_call(z, q, weights, eta=-800.0, alpha=800.0, rule=Rule(read=read), chunk_size=4)
    torch.testing.assert_close(y, q @ weights[0, 4], rtol=1e-12, atol=1e-12)
    assert torch.equal(state, torch.zeros_like(state))


def test_zero_is_a_trap_for_linear_memories():
    """M_0 = 0 generates zero keys and values, so nothing is ever written; the layer never starts there."""
    z, q = double(1, 12, WIDTH), double(1, 12, WIDTH)
    y, state = linear_call(
        z, q, torch.zeros(1, 5, WIDTH, WIDTH).double(), eta=0.0, alpha=1.0, rule=Rule(), chunk_size=4
    )
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(state, torch.zeros_like(state))


def test_anchor_and_causal_reads_agree_at_chunk_size_one_only():
    z, q, weights = double(1, 12, WIDTH), unit(double(1, 12, WIDTH)), double(1, 5, WIDTH, WIDTH)
    reads = {
        (read, size): linear_call(z, q, weights, eta=0.0, alpha=3.0, rule=Rule(read=read), chunk_size=size)[0]
        for read in ("causal", "anchor")
        for size in (1, 4)
    }
    torch.testing.assert_close(reads["causal", 1], reads["anchor", 1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(reads["causal", 4], reads["anchor", 4], rtol=1e-3)


@pytest.mark.parametrize("form", [chunk, reference])
@pytest.mark.parametrize("read", ["causal", "anchor"])
def test_causality_inside_chunks_and_across_their_borders(form, read):
    """A change at token t moves no output up to t; with the anchor read none before the next chunk."""
    z, q, weights = double(1, 12, WIDTH), unit(double(1, 12, WIDTH)), double(1, 5, WIDTH, WIDTH)
    options = {"eta": 0.0, "alpha": 3.0, "rule": Rule(read=read), "chunk_size": 4, "form": form}
    before, _ = linear_call(z, q, weights, **options)
    for t in (0, 3, 4, 6, 11):
        changed = z.clone()
        changed[:, t] += 1.0
        after, _ = linear_call(changed, q, weights, **options)
        first_moved = t + 1 if read == "causal" else (t // 4 + 1) * 4
        torch.testing.assert_close(after[:, :first_moved], before[:, :first_moved], rtol=0, atol=1e-13)
        if first_moved < 12:
            assert not torch.allclose(after[:, first_moved], before[:, first_moved], rtol=1e-6)
