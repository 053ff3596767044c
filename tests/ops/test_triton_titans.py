"""The kernel of Titans against its loop: on the GPU where there is one, else in triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

from nestling.ops import dispatch
from nestling.testing import chunk_equals_loop
from tests.needs import triton_runs

triton_runs()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

KINDS = pytest.mark.parametrize("hidden", [None, 32], ids=["linear", "mlp"])
MOMENTUM = pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])


def inputs(T, K=16, hidden=None, momentum=True, B=1, H=2):
    """Named tensors; weights and state spelled out: W weights, D deviation at the border, S surprise."""
    shapes = [(K, K)] if hidden is None else [(K, hidden), (hidden, K)]
    made = {
        "q": F.normalize(torch.randn(B, T, H, K), dim=-1),
        "k": F.normalize(torch.randn(B, T, H, K), dim=-1),
        "v": torch.randn(B, T, H, K),
        "eta": 0.1 * torch.rand(B, T, H),
        "log_decay": F.logsigmoid(torch.randn(B, T, H) + 3),
    }
    if momentum:
        made["log_momentum"] = F.logsigmoid(torch.randn(B, T, H))
    made |= {f"W{i}": shape[0] ** -0.5 * torch.randn(H, *shape) for i, shape in enumerate(shapes)}
    made |= {f"D{i}": 0.1 * torch.randn(B, H, *shape) for i, shape in enumerate(shapes)}
    if momentum:
        made |= {f"S{i}": 0.1 * torch.randn(B, H, *shape) for i, shape in enumerate(shapes)}
    return {name: x.double() for name, x in made.items()}


def titans(form, made, lengths=None, **options):
    """Anchor and running memory start as one, at a chunk border."""
    W, D, S = ([x for name, x in made.items() if name[0] == letter] for letter in "WDS")
    tokens = {name: x for name, x in made.items() if name[0].islower()}
    momentum = [tokens.pop("log_momentum")] if "log_momentum" in tokens else []
    gates = [tokens.pop("log_decay"), *momentum]
    y, state = dispatch.titans(
        *tokens.values(), *gates, weights=tuple(W), state=(*D, *D, *S), lengths=lengths, form=form, **options
    )
    if lengths is not None:
        y = y * (torch.arange(y.shape[1], device=y.device) < lengths.to(y.device)[:, None])[..., None, None]
    return y, *state


def loop(**made):
    options = {name: made.pop(name) for name in list(made) if not isinstance(made[name], torch.Tensor)}
    return titans("reference", made, made.pop("lengths", None), **options)


def kernel(**made):
    """In float32 and back, so that results and gradients are compared with the float64 loop."""
    options = {name: made.pop(name) for name in list(made) if not isinstance(made[name], torch.Tensor)}
    lengths = made.pop("lengths", None)
    low = {name: x.to(DEVICE, torch.float32) for name, x in made.items()}
    return tuple(y.to("cpu", torch.float64) for y in titans("triton", low, lengths, **options))


@KINDS
@MOMENTUM
def test_kernel_equals_reference_with_every_gradient(hidden, momentum):
    chunk_equals_loop(kernel, loop, inputs(63, hidden=hidden, momentum=momentum), rtol=1e-5, chunk_size=16)


@KINDS
@MOMENTUM
def test_normalized_writes_with_every_gradient(hidden, momentum):
    made = inputs(63, hidden=hidden, momentum=momentum)
    made["k"] = 2 * made["k"]  # curvatures on both sides of 2
    chunk_equals_loop(kernel, loop, made, rtol=1e-5, chunk_size=16, decay_to="initial", normalized=True)


@pytest.mark.parametrize("T", [1, 100, 1000, 4096])
def test_other_lengths(T):
    chunk_equals_loop(kernel, loop, inputs(T, hidden=16), rtol=1e-5, chunk_size=32)


@KINDS
def test_decay_to_the_initial_state_with_padding(hidden):
    options = {"chunk_size": 16, "decay_to": "initial", "lengths": torch.tensor([70, 40])}
    chunk_equals_loop(kernel, loop, inputs(70, hidden=hidden, B=2), rtol=1e-5, **options)


def test_a_chunk_that_fills_no_block_of_the_kernel():
    chunk_equals_loop(kernel, loop, inputs(40, hidden=16), rtol=1e-5, chunk_size=12)


@KINDS
def test_second_derivatives(hidden):
    def gradient(form):
        def call(**made):
            y, *_ = form(**made)
            return torch.autograd.grad(y.square().sum(), (made["k"], made["W0"]), create_graph=True)

        return call

    options = {"chunk_size": 16, "decay_to": "initial"}
    chunk_equals_loop(gradient(kernel), gradient(loop), inputs(32, hidden=hidden, H=1), rtol=1e-5, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 63, 100, 1000, 4096])
@pytest.mark.parametrize("hidden", [None, 64, 128], ids=["linear", "mlp", "wide"])
def test_bfloat16_on_the_gpu(T, hidden):
    made = {name: x.to("cuda", torch.float32) for name, x in inputs(T, 64, hidden, B=2).items()}
    made |= {name: made[name].bfloat16() for name in ("q", "k", "v")} | {"eta": made["eta"] * (10 / 64)}
    results = []
    for form in ("triton", "reference"):
        dtype = torch.float32 if form == "reference" else None
        leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in made.items()}
        outputs = titans(form, leaves, chunk_size=64)
        torch.manual_seed(1)
        loss = sum((y * torch.randn_like(y, dtype=torch.bfloat16)).sum() for y in outputs)
        results.append((outputs, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)))
    (ours, our_gradients), (theirs, their_gradients) = results
    for tolerance, a_list, b_list in ((5e-3, ours, theirs), (1e-2, our_gradients, their_gradients)):
        for a, b in zip(a_list, b_list, strict=True):
            error = float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt())
            assert error <= tolerance, f"{tuple(a.shape)}: relative RMS {error:.2e}, allowed {tolerance:g}"
