"""`bench` where there is nothing to measure on: one sentence, no traceback."""

import importlib.util

import pytest

from fd_fusion.__main__ import main


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed: this is its absence")
@pytest.mark.parametrize("name", ["all-reduce", "qk-norm"])
def test_without_torch_bench_says_what_is_missing(name, capsys):
    assert main(["bench", name]) == 1
    text = capsys.readouterr().err
    assert "No module named 'torch'" in text and "Remedy: run this on a machine with an NVIDIA GPU" in text
