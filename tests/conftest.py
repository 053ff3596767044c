"""What every test runs under: one thread, seed 0, no network, and torch.empty full of NaN inside the package."""

import os
import sys

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "COLUMNS": "160",
    "TRITON_DEFAULT_FP_FUSION": "1",  # what it is; triton 3.9 warns until it is said
}

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: kernels run on the CPU, slowly

EMPTY, EMPTY_LIKE, NEW_EMPTY = torch.empty, torch.empty_like, torch.Tensor.new_empty


def from_package() -> bool:
    """Whether the function that asked for memory two frames up belongs to nestling; what is traced has no frames."""
    if torch.compiler.is_compiling():
        return False
    return sys._getframe(2).f_globals.get("__name__", "").startswith("nestling")


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, so that reading memory nobody wrote shows in the result."""
    return x.fill_(float("nan")) if x.is_floating_point() or x.is_complex() else x


def empty(*args, **kwargs) -> torch.Tensor:
    made = EMPTY(*args, **kwargs)
    return poisoned(made) if from_package() else made


def empty_like(*args, **kwargs) -> torch.Tensor:
    made = EMPTY_LIKE(*args, **kwargs)
    return poisoned(made) if from_package() else made


def new_empty(*args, **kwargs) -> torch.Tensor:
    made = NEW_EMPTY(*args, **kwargs)
    return poisoned(made) if from_package() else made


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    with torch.device("meta"):  # torch lists its constructors now, before torch.empty is replaced: or meta is ignored
        torch.empty(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device; runs where torch finds one")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts from the same random state and cannot read uninitialised memory of ours unnoticed."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
