"""Where the job's store is: every way in which Paddle announces it."""

import pytest

from fd_fusion.frameworks import paddle_runtime

ENDPOINTS = {"PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:6000,10.0.0.2:6001"}
LAUNCHER = {"PADDLE_MASTER": "10.0.0.3:7000", **ENDPOINTS}


@pytest.mark.parametrize(
    "environ, address",
    [
        ({}, None),
        (ENDPOINTS, ("10.0.0.1", 6000)),  # paddle.distributed.spawn: the first rank's
        (LAUNCHER, ("10.0.0.3", 7000)),
        ({"MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "8000", **LAUNCHER}, ("10.0.0.4", 8000)),
        ({"MASTER_ADDR": "10.0.0.4", **LAUNCHER}, ("10.0.0.3", 7000)),
        ({"PADDLE_MASTER": "", **ENDPOINTS}, ("10.0.0.1", 6000)),
        ({"PADDLE_MASTER": "host:port"}, None),
    ],
)
def test_the_address_of_the_store(environ, address):
    assert paddle_runtime.store_address(environ) == address


def test_a_store_that_comes_later_is_found(monkeypatch):
    """What was looked for before init_parallel_env is not lost for ever."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "PADDLE_MASTER", *ENDPOINTS):
        monkeypatch.delenv(name, raising=False)
    made = []
    monkeypatch.setattr(paddle_runtime, "TcpStore", lambda *where: made.append(where) or "a store")
    assert paddle_runtime.tcp_store() is None
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "127.0.0.9:6000,127.0.0.9:6001")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    stores = [paddle_runtime.tcp_store() for _ in range(2)]
    assert stores == ["a store"] * 2 and made == [("127.0.0.9", 6000, 2, 30)]
    paddle_runtime._connect.cache_clear()


@pytest.mark.parametrize(
    "version, refused", [("3.3.0", False), ("3.10.1", False), ("4.0.0", False), ("0.0.0", False), ("3.2.9", True)]
)
def test_versions_below_the_minimum_are_refused(version, refused):
    refusal = paddle_runtime.too_old(version)
    assert (refusal is not None) == refused
    assert not refused or version in str(refusal)
