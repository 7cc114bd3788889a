"""The rank scripts of tests/dist, as real processes under paddle.distributed.launch (gloo, no GPU)."""

import pytest
from support.launch import launch, spawn


@pytest.mark.parametrize("nproc, args", [(1, []), (2, []), (4, ["auto", "eager"]), (2, ["triton", "eager"])])
def test_bind_model(nproc, args, tmp_path):
    results = launch("bind_model.py", nproc, tmp_path, *args)
    assert len({result.get("bits") for result in results}) == 1, "all ranks hold the same bits"


@pytest.mark.parametrize("nproc", [2, 4])
def test_ops(nproc, tmp_path):
    for result in launch("ops.py", nproc, tmp_path):
        assert result["worst"] <= 1


@pytest.mark.parametrize("how", [["refuses"], ["silent"], ["refuses", "strict"]], ids="-".join)
def test_refusal(how, tmp_path):
    reasons = {result["reason"] for result in launch("refusal.py", 2, tmp_path, *how)}
    assert len(reasons) == 1, "every rank tells the same reason"


def test_subgroups(tmp_path):
    results = launch("subgroups.py", 4, tmp_path)
    bits = [result["bits"] for result in results]
    assert bits[0] == bits[1] != bits[2] == bits[3]


def test_paddle_spawn(tmp_path):
    for result in spawn("spawned.py", 2, tmp_path):
        assert result["sites"] == 2 and result["off"] is None and result["worst"] < 1e-5
