"""The short convolution carries its tail; unit_norm has length one and a finite gradient at zero."""

import pytest
import torch

from nestling.memories.projections import ShortConvolution, merge_heads, split_heads, unit_norm


def conv(**options):
    return ShortConvolution(6, **options).double()


@pytest.mark.parametrize("options", [{}, {"activation": False, "residual": True}, {"width": 1}])
def test_equals_the_sum_over_the_window(options):
    layer, x = conv(**options), torch.randn(2, 9, 6, dtype=torch.float64)
    y, _ = layer(x)
    for t in range(9):
        window = [
            layer.weight[j] * x[:, t - layer.width + 1 + j] for j in range(layer.width) if t - layer.width + 1 + j >= 0
        ]
        want = sum(window)
        want = torch.nn.functional.silu(want) if layer.activation else want
        torch.testing.assert_close(y[:, t], want + x[:, t] if layer.residual else want)


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9])
def test_two_calls_equal_one(cut):
    layer, x = conv(), torch.randn(2, 9, 6, dtype=torch.float64)
    whole, tail = layer(x)
    first, state = layer(x[:, :cut])
    second, state = layer(x[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, tail)


def test_padding_does_not_enter_the_tail():
    layer, x = conv(), torch.randn(3, 5, 6, dtype=torch.float64)
    lengths = torch.tensor([0, 2, 5])
    _, tail = layer(x, torch.ones(3, 3, 6, dtype=torch.float64), lengths)
    for row, n in enumerate(lengths.tolist()):
        want = layer(x[row : row + 1, :n], torch.ones(1, 3, 6, dtype=torch.float64))[1]
        torch.testing.assert_close(tail[row : row + 1], want)


def test_gradient_of_the_convolution():
    layer, x = conv(), torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: layer(a, b), (x, tail))


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="needs"):
        conv()(torch.zeros(2, 3, 5))


def test_unit_norm_and_heads():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(unit_norm(x).norm(dim=-1), torch.ones(2, 3, dtype=torch.float64), rtol=1e-5, atol=0)
    zero = torch.zeros(4, requires_grad=True)
    unit_norm(zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()
    torch.testing.assert_close(merge_heads(split_heads(x, 2)), x)
