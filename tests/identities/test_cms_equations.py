"""Paper section 4: what (71) writes, how often, and with whose gradient."""

import pytest
import torch
from torch import nn

from nestling.ops.cms_update.chunk import cms_update
from nestling.testing import assert_close

WIDTH, TOKENS = 5, 12


class Chain(nn.Module):
    """Two levels and a head; the first level's error has to pass through all that follows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return hidden, self.head(hidden + torch.tanh(self.second(hidden)))


def case():
    model = Chain().double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    target = torch.randint(WIDTH, (TOKENS,))
    return model, x, target


def errors(model, x, target):
    """Gradient of the summed task loss at the output of each level's linear layer."""
    seen = {}

    def keep(name):
        def hook(module, args, out):
            out.retain_grad()
            seen[name] = (args[0], out)

        return hook

    hooks = [model.first.register_forward_hook(keep("first")), model.second.register_forward_hook(keep("second"))]
    loss = nn.functional.cross_entropy(model(x)[1][0], target, reduction="sum")
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: (inputs.detach(), out.grad) for name, (inputs, out) in seen.items()}, loss


@pytest.mark.parametrize("name", ["first", "second"])
def test_one_window_of_all_tokens_is_one_sgd_step_on_the_summed_loss(name):
    model, x, target = case()
    before = model.get_parameter(f"{name}.weight").detach().clone()
    found, _ = errors(model, x, target)
    delta, _, _, writes = cms_update(*found[name], torch.tensor(0.1, dtype=torch.float64), period=TOKENS)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_close(before + delta[0], model.get_parameter(f"{name}.weight").detach(), f"{name}.weight")
    assert writes.tolist() == [1]


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_level_gradient_is_autograd_through_the_later_blocks(name):
    model, x, target = case()
    found, _ = errors(model, x, target)
    loss = nn.functional.cross_entropy(model(x)[1][0], target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, model.get_parameter(f"{name}.weight"))
    delta, *_ = cms_update(*found[name], torch.tensor(1.0, dtype=torch.float64), period=TOKENS)
    assert_close(-delta[0], expected, name)


def test_one_error_for_all_levels_is_wrong_for_the_earlier_one():
    """The shortcut of feeding the last level's error to every level."""
    model, x, target = case()
    found, _ = errors(model, x, target)
    (inputs, own), (_, shared) = found["first"], found["second"]
    rate = torch.tensor(1.0, dtype=torch.float64)
    exact, shortcut = (cms_update(inputs, error, rate, period=TOKENS)[0] for error in (own, shared))
    assert (exact - shortcut).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("period", [1, 5, 16])
@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
def test_after_n_tokens_a_level_has_written_n_over_period_times(tokens, period):
    x, error = torch.randn(2, 1, tokens, WIDTH, dtype=torch.float64)
    _, _, count, writes = cms_update(x, error, torch.tensor(1.0), period=period)
    assert (writes.item(), count.item()) == (tokens // period, tokens % period)


def test_tokens_of_an_open_window_are_not_in_the_weights_yet():
    x, error = torch.randn(2, 1, 10, WIDTH, dtype=torch.float64)
    delta, *_ = cms_update(x, error, torch.tensor(1.0), period=8)
    x[:, 8:] += 1
    perturbed, *_ = cms_update(x, error, torch.tensor(1.0), period=8)
    assert torch.equal(delta, perturbed)


def test_rate_zero_changes_nothing_bit_for_bit():
    x, error = torch.randn(2, 1, 40, WIDTH, dtype=torch.float64)
    delta, *_ = cms_update(x, error, torch.tensor(0.0), period=8)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    assert torch.equal(weight + delta[0], weight)


def test_the_window_sums_exactly_period_tokens():
    """(71) prints t = i - C ... i, which is C + 1 terms; the second window must not see the first one's last token."""
    x = torch.eye(8, dtype=torch.float64)[None]
    error = torch.ones(1, 8, 1, dtype=torch.float64)
    first, *_ = cms_update(x[:, :4], error[:, :4], torch.tensor(1.0), period=4)
    both, *_ = cms_update(x, error, torch.tensor(1.0), period=4)
    assert (-first[0, 0]).tolist() == [1] * 4 + [0] * 4
    assert (-both[0, 0]).tolist() == [1] * 8
