"""The kernel of Newton-Schulz against its loop: on the GPU where there is one, else in triton's interpreter."""

import pytest
import torch

from nestling.ops import dispatch
from nestling.testing import assert_close
from tests.needs import triton_runs

triton_runs()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.mark.parametrize("shape", [(16, 16), (3, 70), (130, 67), (2, 65, 80)])
def test_kernel_equals_reference(shape):
    X = torch.randn(shape, dtype=torch.float64)
    made = dispatch.newton_schulz(X.to(DEVICE, torch.float32), form="triton")
    assert_close(made.to("cpu", torch.float64), dispatch.newton_schulz(X, form="reference"), rtol=1e-5)


def test_symmetric_product_adds_the_other_term_and_writes_both_halves():
    from nestling.ops.newton_schulz.triton import symmetric

    x, added = torch.randn(2, 70, 40, device=DEVICE), torch.randn(2, 70, 70, device=DEVICE)
    added = added + added.mT
    assert_close(symmetric(x, added, b=-2.0, c=0.5), 0.5 * x @ x.mT - 2 * added, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 100), (3, 256, 512), (300, 700), (1024, 256)])
def test_bfloat16_on_the_gpu(shape):
    X = torch.randn(shape, device="cuda")
    expected = dispatch.newton_schulz(X, form="reference").double()
    error = dispatch.newton_schulz(X.bfloat16(), form="triton").double() - expected
    plain = dispatch.newton_schulz(X.bfloat16(), form="batched").double() - expected
    assert error.square().mean() < 1.5 * plain.square().mean()
