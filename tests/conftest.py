"""Shared by all tests: the tests' own helpers are importable as `support`, the benchmarks as `bench`."""

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
# Some CI images set it. Every rank would compile the package anew: 0.16 of 0.24 s of its import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def _no_fusion_environment(monkeypatch):
    """A test starts with nothing asked for, whatever the shell says."""
    for name in [name for name in os.environ if name.startswith("FD_")]:
        monkeypatch.delenv(name)
