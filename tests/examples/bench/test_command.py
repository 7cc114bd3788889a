"""`bench` where there is nothing to measure on: one sentence, no traceback."""

import importlib.util

import pytest
from bench.command import main


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed: this is its absence")
@pytest.mark.parametrize("name", ["all-reduce", "qk-norm"])
def test_without_torch_bench_says_what_is_missing(name, capsys):
    assert main([name]) == 1
    text = capsys.readouterr().err
    assert text == "bench: No module named 'torch'; run this on a machine with an NVIDIA GPU and torch\n"
