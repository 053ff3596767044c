"""What tests of kernels need: triton, and where there is no GPU an interpreter that works with this numpy."""

import numpy
import pytest
import torch


def triton_runs() -> None:
    """Skip the test, or the module that calls this at its top, where triton cannot run a kernel."""
    triton = pytest.importorskip("triton", reason="triton is not installed; it is in the extra kernels-test")
    triton_release, numpy_release = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy))
    if not torch.cuda.is_available() and triton_release < (3, 9) and numpy_release >= (2, 4):
        pytest.skip("the interpreter of triton < 3.9 cannot multiply with numpy >= 2.4", allow_module_level=True)
