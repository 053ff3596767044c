"""The tests of this folder need the extra `hf`: where it is missing they are skipped, but not in CI, which has it."""

import importlib.util
import os

import pytest


def need(package: str) -> None:
    """Skip the module that calls this if `package` is not there."""
    if importlib.util.find_spec(package) is None:
        assert not os.environ.get("CI"), f"CI runs these tests: {package} is in the extra test"
        pytest.skip(f"{package} is not installed; runs with: pip install 'nestling[test]'", allow_module_level=True)
