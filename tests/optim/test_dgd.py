"""DGD: which inputs it sees, in which layers, and what it refuses."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestling.core.rule import erased
from nestling.optim import DGD
from nestling.optim.layer_inputs import patches
from nestling.testing import assert_close


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def step_by_hand(weight, gradient, x, lr, erase=1.0):
    """The argmin for one matrix (out, in) and its inputs x (N, in)."""
    moved = (weight - lr * gradient).mT
    return (moved - erased(moved, x, lr * erase / len(x))).mT


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "2d, strided, groups": (nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, padding=1), (2, 4, 5, 6)),
    "2d, dilated, reflect": (nn.Conv2d(3, 2, 3, dilation=2, padding=2, padding_mode="reflect"), (2, 3, 6, 5)),
    "2d, same": (nn.Conv2d(3, 2, (2, 3), padding="same"), (1, 3, 4, 4)),
    "2d, unbatched": (nn.Conv2d(3, 2, 2), (3, 4, 4)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_on_its_patches(name):
    """The keys of each group times its weight are the output; the step is the linear layer's on these keys."""
    layer, shape = CONVOLUTIONS[name]
    layer = copy.deepcopy(layer).double()
    x, before = randn(*shape), layer.weight.detach().clone()
    optimizer = DGD(layer, 0.3)
    y = layer(x)
    y.sin().sum().backward()
    gradient, groups = layer.weight.grad.clone(), layer.groups
    rows = patches(layer, x)  # (G, N, K)
    out = rows @ optimizer.keys[layer.weight].fold(before)  # (G, N, out / G)
    bias = layer.bias.detach().view(-1, *[1] * len(layer.kernel_size))
    y = (y.detach() - bias).unflatten(-len(layer.kernel_size) - 1, (groups, -1))
    channels = y.dim() - len(layer.kernel_size) - 1
    assert_close(out.flatten(1, -2), y.movedim((channels - 1, channels), (0, -1)).flatten(1, -2), "keys times weight")

    optimizer.step()
    for g in range(groups):
        part = slice(g * layer.out_channels // groups, (g + 1) * layer.out_channels // groups)
        by_hand = step_by_hand(before[part].flatten(1), gradient[part].flatten(1), rows[g], 0.3)
        assert_close(layer.weight.detach()[part].flatten(1), by_hand, "W")


@pytest.mark.parametrize("exact", [True, False])
def test_an_embedding_is_a_linear_layer_on_one_hot_inputs(exact):
    table = nn.Embedding(7, 3, padding_idx=2).double()
    tokens = torch.tensor([[1, 1, 4], [2, 6, 1]])
    seen = tokens[tokens != 2]
    layer = nn.Linear(7, 3, bias=False).double()
    layer.weight.data = table.weight.data.mT.clone()
    targets = randn(5, 3)
    for model, y in ((table, lambda: table(seen)), (layer, lambda: layer(F.one_hot(seen, 7).double()))):
        optimizer = DGD(model, 0.4, exact)
        (y() - targets).square().mean().backward()
        optimizer.step()
    assert_close(table.weight.detach(), layer.weight.detach().mT, "W")
    padded = nn.Embedding(7, 3, padding_idx=2).double()
    before = padded.weight.detach().clone()
    optimizer = DGD(padded, 0.4, exact)
    padded(tokens).sin().sum().backward()
    assert optimizer.keys[padded.weight].count == 5
    optimizer.step()
    same = [torch.equal(row, old) for row, old in zip(padded.weight, before, strict=True)]
    assert same == [True, False, True, True, False, True, False]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sizes", [(3, 2), (9, 4)], ids=["rows", "gram"])
def test_accumulated_gradients_equal_one_batch(sizes, exact):
    one = nn.Linear(6, 4).double()
    other = copy.deepcopy(one)
    parts = [randn(n, 6) for n in sizes]
    total = sum(sizes)
    ours, theirs = DGD(one, 0.3, exact), DGD(other, 0.3, exact)
    for _ in range(2):
        for x in parts:
            (one(x).sin().sum() / total).backward()
        (other(torch.cat(parts)).sin().sum() / total).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert_close(one.weight, other.weight, "W")
    assert_close(one.bias, other.bias, "b")


def test_the_keys_of_a_weight_are_bounded_and_forgotten_after_the_step():
    layer = nn.Linear(6, 4)
    optimizer = DGD(layer, 0.1)
    keys = optimizer.keys[layer.weight]
    for n in (4, 2, 100):
        layer(torch.randn(n, 6)).sum().backward()
        kept = [x for x in (keys.rows, keys.gram) if x is not None]
        assert sum(x.numel() for x in kept) <= 36
    assert keys.count == 106
    optimizer.step()
    assert keys.rows is keys.gram is None and keys.count == 0
    layer(torch.randn(3, 6)).sum().backward()
    optimizer.zero_grad()
    assert keys.count == 0


def test_a_forward_pass_without_backward_leaves_nothing():
    layer = nn.Linear(6, 4)
    optimizer = DGD(layer, 0.1)
    x = torch.randn(3, 6)
    alive = weakref.ref(x)
    y = layer(x)
    with torch.no_grad():
        layer(x)
    del x, y
    gc.collect()
    assert alive() is None and optimizer.keys[layer.weight].count == 0


def test_inputs_count_when_the_gradient_of_their_weight_is_computed():
    """Not on the way to other tensors: a level that learns takes gradients of its own."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = DGD(model, 0.1)
    first, second = (optimizer.keys[model[i].weight] for i in (0, 2))
    x = torch.randn(3, 6, requires_grad=True)
    loss = model(x).sum()
    torch.autograd.grad(loss, [x, model[2].bias], retain_graph=True)
    assert (first.count, second.count) == (0, 0)
    torch.autograd.grad(loss, [x, model[2].weight], retain_graph=True)
    assert (first.count, second.count) == (0, 3)
    loss.backward()
    assert (first.count, second.count) == (3, 6)


def test_only_some_parameters_are_written():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    optimizer = DGD(model, 0.1, only=[("0.weight", model[0].weight)])
    assert set(optimizer.keys) == {model[0].weight}
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]
    assert changed == ["0.weight"]


def test_activations_are_freed_with_the_graph_and_not_kept_by_the_loss():
    layer = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))  # in place on an observed output
    DGD_of_layer = DGD(layer, 0.1)
    alive = []
    layer[2].register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    loss = layer(torch.randn(30, 3)).sum()
    loss.backward()
    gc.collect()
    assert alive[0]() is None and DGD_of_layer.keys[layer[0].weight].count == 30


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_sees_every_input_once(reentrant):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    other = copy.deepcopy(model)
    ours, theirs = DGD(model, 0.2), DGD(other, 0.2)
    x = randn(4, 6).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sin().mean().backward()
    other(x).sin().mean().backward()
    assert ours.keys[model[0].weight].count == 4
    ours.step()
    theirs.step()
    assert_close(model[0].weight, other[0].weight, "W")


def test_a_layer_that_runs_twice_meets_both_inputs():
    layer = nn.Linear(4, 4, bias=False).double()
    x, before = randn(3, 4), layer.weight.detach().clone()
    optimizer = DGD(layer, 0.3)
    middle = layer(x).sin()
    layer(middle).sin().sum().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    expected = step_by_hand(before, gradient, torch.cat([x, middle.detach()]), 0.3)
    assert_close(layer.weight.detach(), expected, "W")


def test_linear_layers_may_share_a_weight():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    optimizer = DGD(model, 0.3)
    model(randn(3, 4)).sum().backward()
    assert optimizer.keys[model[0].weight].count == 6


def tied():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_weight_with_two_sorts_of_keys_is_refused():
    with pytest.raises(ValueError, match="weight 1.weight is shared with 0.weight"):
        DGD(tied(), 0.1)
    model = tied()
    optimizer = DGD(model, 0.1, plain=["*.weight"])
    before = model[0].weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert_close(model[0].weight.detach(), before - 0.1 * model[0].weight.grad, "W", rtol=1e-6)


def test_a_gradient_whose_inputs_were_not_seen_is_refused():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer, 0.1)
    F.linear(torch.randn(4, 3), layer.weight).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has a gradient, but DGD saw no inputs"):
        optimizer.step()


def test_hooks_can_be_removed_and_go_with_the_optimizer():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer, 0.1)
    optimizer.remove_hooks()
    assert not layer._forward_hooks
    optimizer = DGD(layer, 0.1)
    assert len(layer._forward_hooks) == 1
    del optimizer
    gc.collect()
    assert not layer._forward_hooks


def test_copies_of_the_model_are_not_observed():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer, 0.1)
    file = io.BytesIO()
    pickle.dump(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), pickle.load(file)):
        copied(torch.randn(4, 3)).sum().backward()
    assert optimizer.keys[layer.weight].count == 0


def test_bfloat16_autocast_and_keyword_inputs():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        layer(input=torch.randn(2, 3)).sum().backward()
    assert optimizer.keys[layer.weight].rows.dtype == torch.float32
    optimizer.step()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="erase is -1"):
        DGD(nn.Linear(2, 2), 0.1, erase=-1.0)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        DGD(nn.Linear(2, 2), 0.1, reduction="none")
