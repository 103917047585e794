"""Tests that need a GPU: `pytest tests/gpu`. They are skipped where none is visible."""

import pytest
import torch


def pytest_runtest_setup(item):
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible; the rest of the suite hides it, so run `pytest tests/gpu` by itself")
