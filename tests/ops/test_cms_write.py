"""The write of a factored gradient: product form and kernel against the token loop."""

import pytest
import torch

from nestling.ops import dispatch
from nestling.ops.cms_write.chunk import cms_write as chunk
from nestling.ops.cms_write.reference import cms_write as reference
from nestling.testing import assert_close, chunk_equals_loop
from tests.needs import triton_runs

KEEP = pytest.mark.parametrize("keep", [1.0, 0.7])


def inputs(R, O, I, B=2):
    made = {
        "delta": torch.randn(B, O, I),
        "left": torch.randn(B, R, O),
        "right": torch.randn(B, R, I),
        "scale": torch.randn(B),
    }
    return {name: x.double() for name, x in made.items()}


@KEEP
@pytest.mark.parametrize(("R", "O", "I"), [(1, 3, 5), (63, 7, 4), (100, 5, 6), (1000, 4, 3), (4096, 3, 2)])
def test_the_product_equals_the_loop_with_every_gradient(R, O, I, keep):
    chunk_equals_loop(chunk, reference, inputs(R, O, I), keep=keep)


def test_each_row_has_its_own_scale_and_the_old_matrix_stays():
    made = inputs(4, 3, 5)
    before = made["delta"].clone()
    made["scale"] = torch.tensor([0.0, 2.0], dtype=torch.float64)
    for form in ("reference", "chunk"):
        after = dispatch.cms_write(**made, keep=0.5, form=form)
        assert_close(after[0], 0.5 * before[0], f"{form}: nothing is added", 1e-12)
        assert_close(after[1], 0.5 * before[1] + 2 * made["left"][1].mT @ made["right"][1], form, 1e-12)
    assert torch.equal(made["delta"], before)


@KEEP
@pytest.mark.parametrize(("R", "O", "I"), [(1, 5, 70), (33, 65, 20), (70, 16, 130)])
def test_the_kernel_equals_the_loop(R, O, I, keep):
    """Sizes below, at and above a tile, with rests in all three; on the GPU where there is one."""
    triton_runs()
    made, device = inputs(R, O, I), "cuda" if torch.cuda.is_available() else "cpu"
    expected = reference(**made, keep=keep)
    low = {name: x.to(device, torch.float32) for name, x in made.items()}
    ours = dispatch.cms_write(**low, keep=keep, form="triton")
    assert ours.dtype == torch.float32
    assert_close(ours.cpu().double(), expected, "kernel", 1e-6)


def test_the_kernel_has_no_gradients_and_says_so():
    triton_runs()
    made = {name: x.float().requires_grad_() for name, x in inputs(2, 3, 4).items()}
    with pytest.raises(ValueError, match="no backward"):
        dispatch.cms_write(**made, form="triton")
    with torch.no_grad():
        dispatch.cms_write(**made, form="triton")
