"""Optional packages in tests: a missing one skips a test, or fails it if CI requires all."""

import importlib
import os
from types import ModuleType

import pytest


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, or skips the test with the extra that would install it.

    With `DSR_REQUIRE_ALL=1` a missing module fails the test instead.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} is not installed: pip install 'dsr_jax[{extra}]' ({error})"
    if os.environ.get("DSR_REQUIRE_ALL") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)
