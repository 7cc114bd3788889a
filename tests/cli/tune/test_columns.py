"""What `tune` says where a column cannot be measured."""

import contextlib
from types import SimpleNamespace

import pytest

from fd_fusion.cli.tune import rank
from fd_fusion.reasons import FusionError
from fd_fusion.spec import OpSpec


def test_a_residual_that_cannot_stay_is_not_timed_under_that_name(monkeypatch):
    closed = []
    op = SimpleNamespace(may_stay=False, close=lambda: closed.append(True))
    monkeypatch.setattr(rank, "load_backend", lambda *_: (SimpleNamespace(open=lambda *_: op), None))
    monkeypatch.setattr(rank, "working", contextlib.nullcontext)
    spec = OpSpec(0, 4, 4096, "bfloat16", device="cpu", arch=None, workspace_bytes=1 << 10, two_shot_rows=1)
    with pytest.raises(FusionError, match=r"the workspace needs [0-9]+ bytes and may have 1024"):
        rank._column(None, None, spec, "triton", True, {"rows": [1]}, None)
    assert closed
