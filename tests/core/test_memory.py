import pytest
import torch

from nestling.core.memory import LinearMemory, MLPMemory, scan
from nestling.core.objective import DotProduct, L2Regression, RobustLp
from nestling.core.rule import gradient_descent
from nestling.testing import assert_close

MEMORIES = [LinearMemory(4, 4), MLPMemory(4, 6)]


def filled(memory, *lead):
    return {name: torch.randn_like(w).requires_grad_() for name, w in memory.init(*lead, dtype=torch.float64).items()}


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("objective", [DotProduct(), L2Regression(), RobustLp()], ids=str)
def test_closed_form_gradient_equals_autograd(memory, objective):
    params = filled(memory, 2, 3)
    k, v = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    weights = torch.rand(2, 3, 5, dtype=torch.float64)
    loss = (weights * objective.loss(memory.read(params, k), v)).sum()
    expected = torch.autograd.grad(loss, list(params.values()))
    for (name, actual), wanted in zip(memory.gradient(params, k, v, objective, weights).items(), expected, strict=True):
        assert_close(actual, wanted, name)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_inputs_and_output_errors_make_the_gradient(memory):
    """Every gradient is inputs^T times something of the outputs' width: inputs name the keys of each matrix."""
    params = filled(memory)
    k = torch.randn(1, 4, dtype=torch.float64)
    gradient = memory.pullback(params, k, torch.randn(1, 4, dtype=torch.float64))
    for name, x in memory.inputs(params, k).items():
        direction = x / x.norm()
        assert_close(direction.mT @ (direction @ gradient[name]), gradient[name], name)


def test_mlp_memory_with_zero_output_matrix_is_the_identity():
    memory = MLPMemory(4, 6)
    params = memory.init(dtype=torch.float64)
    z = torch.randn(3, 4, dtype=torch.float64)
    assert_close(memory.read(params | {"W1": torch.zeros_like(params["W1"])}, z), z, "identity")


def test_memories_on_leading_axes_do_not_interact():
    memory = MLPMemory(4, 6)
    params = {name: w.detach() for name, w in filled(memory, 2).items()}
    k, v = torch.randn(2, 2, 7, 4, dtype=torch.float64)
    rule = {"objective": L2Regression(), "rule": gradient_descent(0.1)}
    both, _, _ = scan(memory, params, k, v, **rule)
    alone, _, _ = scan(memory, {name: w[1:] for name, w in params.items()}, k[1:], v[1:], **rule)
    assert_close(both[1:], alone, "second row")


def test_a_write_of_a_window_sums_its_pairs_at_the_window_start():
    memory = LinearMemory(4, 4)
    k, v = torch.randn(2, 8, 4, dtype=torch.float64)
    rule = {"objective": L2Regression(), "rule": gradient_descent(0.1)}
    out, params, _ = scan(memory, memory.init(dtype=torch.float64), k, v, period=4, read="before", **rule)
    first = 0.1 * k[:4].mT @ v[:4]
    second = first - 0.1 * k[4:].mT @ (k[4:] @ first - v[4:])
    assert_close(params["M"], second, "M")
    assert_close(out, torch.cat([torch.zeros_like(v[:4]), k[4:] @ first]), "reads")


def test_an_unfilled_last_window_is_read_but_not_written():
    memory = LinearMemory(4, 4)
    k, v = torch.randn(2, 6, 4, dtype=torch.float64)
    rule = {"objective": DotProduct(), "rule": gradient_descent()}
    out, params, _ = scan(memory, memory.init(dtype=torch.float64), k, v, period=4, read="before", **rule)
    assert out.shape == (6, 4)
    assert_close(params["M"], k[:4].mT @ v[:4], "M")


def test_a_read_that_would_look_ahead_is_refused():
    memory = LinearMemory(4, 4)
    k = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="period is 2"):
        scan(memory, memory.init(), k, k, objective=DotProduct(), rule=gradient_descent(), period=2)
