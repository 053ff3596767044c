"""The kernels of self-modifying Titans: in triton's interpreter here, on the GPU itself where there is one."""

import pytest
import torch

from nestling.ops import dispatch
from nestling.ops.self_modifying import Rule, fused, one_layer, reference
from tests.needs import triton_runs

triton_runs()
from nestling.ops.self_modifying import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py switches the interpreter on without one
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
RAGGED = torch.tensor([[True, True], [True, False], [True, False]])


def inputs(hidden, *, rows=2, heads=2, chunks=3, chunk_size=16, width=16):
    """What `write_chunks` takes, float64: z, weight, features or None, gate_weight, gate_bias, rates, E."""

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, dtype=torch.float64) * scale

    F = hidden or width
    return [
        torch.nn.functional.normalize(normal(rows, heads, chunks * chunk_size, F), dim=-1),
        normal(heads, F, 5, width, scale=F**-0.5),
        normal(heads, width, F) if hidden else None,
        normal(2, heads, width),
        torch.tensor([[0.0], [3.0]], dtype=torch.float64).repeat(1, heads),
        torch.rand(heads, 5, dtype=torch.float64) * 0.3,
        normal(rows, heads, F, 5, width, scale=0.2),
    ]


def run(writer, tensors, full, chunk_size=16, dtype=torch.float64, device="cpu"):
    """The five results, and the gradients of a fixed random functional of them."""
    leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in tensors]
    results = writer(None, None if full is None else full.to(device), chunk_size, 2.0, *leaves)
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    found = torch.autograd.grad(results, [x for x in leaves if x is not None], outer)
    return [x.detach() for x in results], list(found)


def assert_near(got, want, bound):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = ((a.cpu() - b).square().mean() / b.square().mean()).sqrt().item()
        assert error < bound, f"{i}: relative RMS error {error:.1e} of {tuple(b.shape)}"


@pytest.mark.parametrize(("hidden", "full"), [(32, RAGGED), (0, None)], ids=["features, ragged", "linear"])
def test_writes_and_every_gradient(hidden, full):
    tensors = inputs(hidden)
    results, grads = run(kernels.write_chunks, tensors, full, dtype=torch.float32, device=DEVICE)
    exact_results, exact_grads = run(fused.write_chunks, tensors, full)
    assert_near(results, exact_results, 1e-5)
    assert_near(grads, exact_grads, 1e-5)


def test_without_gradients_two_states_are_enough():
    tensors = [t.to(DEVICE, torch.float32) for t in inputs(0, heads=1) if t is not None]
    tensors.insert(2, None)
    plain = kernels.write_chunks(None, RAGGED.to(DEVICE), 16, 2.0, *tensors)
    tensors[0] = tensors[0].clone().requires_grad_()
    learning = kernels.write_chunks(None, RAGGED.to(DEVICE), 16, 2.0, *tensors)
    for a, b in zip(plain, learning, strict=True):
        assert a.grad_fn is None and torch.equal(a, b.detach())


def test_one_key_written_at_the_largest_rate():
    """(I + L)^-1 stays bounded where the powers of L, with entries up to 2^8 C(15, 8), would eat the digits."""
    tensors = inputs(0, rows=1, heads=1, chunks=1)
    tensors[0] = tensors[0][:, :, :1].expand(-1, -1, 16, -1)
    tensors[4] = torch.full_like(tensors[4], 20.0)  # eta = 2, no decay
    tensors[5] = torch.ones_like(tensors[5])
    results, _ = run(kernels.write_chunks, tensors, None, dtype=torch.float32, device=DEVICE)
    exact, _ = run(fused.write_chunks, tensors, None)
    assert_near(results, exact, 1e-5)


def call(op, arguments, dtype, device="cpu", chunk_size=16, **options):
    """y and the final state of the op, and the gradient of a fixed random functional in every input."""
    given = {n: x.to(device, dtype).requires_grad_() for n, x in arguments.items()}
    leaves = list(given.values())
    places = [given.pop(n) for n in ("z", "q", "weights", "gate_weight", "gate_bias", "rates", "state")]
    places[2], state = (places[2],), (places.pop(),)
    y, after = op(*places, state=state * 2, rule=Rule(), chunk_size=chunk_size, **given, **options)
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, *after)]
    return [x.detach() for x in (y, *after)], list(torch.autograd.grad((y, *after), leaves, outer))


@pytest.mark.parametrize(("tokens", "chunk_size"), [(1, 16), (63, 16), (100, 16), (1000, 16), (4096, 64)])
def test_the_whole_op(tokens, chunk_size):
    """4,096 tokens with generators at the rates that the layer starts from, 0.1 at most: at 0.3 rounding grows so much
    along the way that the chunk form in float32 is 4e-6 off too, and the kernel 1.1e-5."""
    _, weights, features, gate_weight, gate_bias, rates, E = inputs(32, rows=1, heads=1, chunks=1)
    z, q = torch.nn.functional.normalize(torch.randn(2, 1, tokens, 1, 16, dtype=torch.float64), dim=-1)
    arguments = {"z": z, "q": q, "weights": weights.transpose(1, 2), "state": E.transpose(2, 3), "features": features}
    arguments |= {"gate_weight": gate_weight, "gate_bias": gate_bias, "rates": rates / 3 if tokens > 1000 else rates}
    results, grads = call(dispatch.self_modifying, arguments, torch.float32, DEVICE, chunk_size, form="triton")
    exact_results, exact_grads = call(reference.self_modifying, arguments, torch.float64, chunk_size=chunk_size)
    assert_near(results, exact_results, 1e-5)
    assert_near(grads, exact_grads, 1e-5)


def test_second_derivatives_go_through_the_loop():
    z, weight, _, *gates, E = (
        None if t is None else t.float().to(DEVICE) for t in inputs(0, rows=1, heads=1, chunks=1)
    )
    z.requires_grad_()
    memories = one_layer.OneLayer(weight.transpose(1, 2), None, tuple(gates), Rule())
    found = []
    for writer in (fused.write_chunks, kernels.write_chunks):
        results = writer(memories.record, None, 16, 2.0, z, weight, None, *gates, E)
        (first,) = torch.autograd.grad(results[1].square().sum(), z, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), z)
    assert_near([found[1]], [found[0].cpu()], 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 24}, r"chunk_size is 24 and the kernel takes \(16, 32, 64\)"),
        ({"rule": Rule(erase="none")}, "one matrix per memory, given queries and Rule"),
        ({"weights": (torch.zeros(1, 5, 8, 8),)}, r"widths are \(8, 8\)"),
        ({"weights": (torch.zeros(1, 5, 128, 128),)}, "128 x 128 entries and the kernel takes 8192"),
        (
            {"weights": (torch.zeros(1, 5, 16, 16, dtype=torch.bfloat16),)},
            "bfloat16 and the kernel takes torch.float32",
        ),
    ],
    ids=["chunk", "rule", "width", "size", "dtype"],
)
def test_a_call_beyond_the_kernel_is_refused_by_name(change, message):
    call = {"rule": Rule(), "chunk_size": 16, "weights": (torch.zeros(1, 5, 16, 16),)} | change
    z = torch.zeros(1, 32, 1, call["weights"][0].shape[-1])
    with pytest.raises(ValueError, match=message):
        dispatch.self_modifying(z, z, call.pop("weights"), form="triton", **call)


@pytest.mark.parametrize("precision", [pytest.param(p, marks=NEEDS_GPU) for p in ("highest", "high", "medium")])
@pytest.mark.parametrize(("hidden", "width"), [(0, 64), (128, 64)])
def test_on_a_gpu(hidden, width, precision):
    tensors = inputs(hidden, rows=4, heads=4, chunks=8, chunk_size=64, width=width)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        results, grads = run(kernels.write_chunks, tensors, None, 64, torch.float32, "cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    exact_results, exact_grads = run(fused.write_chunks, tensors, None, 64)
    assert_near(results, exact_results, 1e-5 if precision == "highest" else 5e-3)
    assert_near(grads, exact_grads, 1e-5 if precision == "highest" else 1e-2)
