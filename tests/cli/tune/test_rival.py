"""Which rival `tune` measures against, by the number of rows; the host's own all-reduce on fakes of its modules."""

import contextlib
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest

from fd_fusion.cli.tune import rank as tune_rank
from fd_fusion.cli.tune import rival as rivals
from fd_fusion.comm import symmetric_memory
from fd_fusion.comm.vote import Vote
from fd_fusion.hosts.fastdeploy import custom_all_reduce
from fd_fusion.spec import OpSpec

SPEC = OpSpec(0, 2, 4096, "bfloat16", device="gpu", arch=90)
JOB = {"rows": [1, 1024, 1025, 2048], "timeout_s": 1, "ports": [1, 2, 3], "rounds": 1}


@pytest.fixture
def alone(monkeypatch):
    """A vote of one rank, and no Paddle group, pull or host that would need GPUs."""
    monkeypatch.setattr(symmetric_memory, "agree", lambda group, topic, vote, timeout_s: _verdict(vote))
    monkeypatch.setattr(rivals, "_paddle_rival", lambda *_: rival("NCCL", 2048))
    monkeypatch.setattr(rivals, "Pull", lambda *_: None)
    monkeypatch.setattr(rivals, "_pull_rival", lambda framework, spec, pull: rival("pull", 1024))
    return monkeypatch


def _verdict(vote: Vote):
    return SimpleNamespace(ok=vote.refusal is None, reason=vote.refusal, data=(vote.data,))


OWN = "fastdeploy.distributed.custom_all_reduce.custom_all_reduce"


def rival(name, most_rows):
    return rivals.Rival(name, most_rows, lambda x: x, [lambda x, r, w: (x, r)])


def opened(monkeypatch, has_host):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: has_host or None)
    return rivals.open_rivals(SimpleNamespace(__name__="paddle"), SPEC, None, JOB)


def test_the_host_itself_where_it_is_installed(alone):
    alone.setitem(sys.modules, OWN, SimpleNamespace(custom_ar=True))
    alone.setattr(rivals, "_host_rival", lambda *_: rival("FastDeploy", 1024))
    found, skipped = opened(alone, True)
    assert [one.name for one in found] == ["FastDeploy", "NCCL"] and skipped == {}
    assert rivals.told(found) == "FastDeploy up to 1024 rows, NCCL"


def test_a_host_that_would_use_nccl_is_measured_by_nccl_and_the_pull_stands_where_there_is_no_host(alone):
    def raises(*_):
        raise RuntimeError("it does not take 3 ranks")

    alone.setattr(rivals, "_host_rival", raises)
    alone.setitem(sys.modules, OWN, SimpleNamespace(custom_ar=True))
    found, skipped = opened(alone, True)
    assert [one.name for one in found] == ["NCCL"] and "3 ranks" in skipped["FastDeploy"]
    alone.setattr(rivals, "_host_rival", lambda *_: pytest.fail("no rank opens what another one cannot"))
    alone.setitem(sys.modules, OWN, SimpleNamespace(custom_ar=False))
    found, skipped = opened(alone, True)
    assert [one.name for one in found] == ["NCCL"] and "not compiled" in skipped["FastDeploy"]
    found, skipped = opened(alone, False)
    assert [one.name for one in found] == ["pull", "NCCL"] and skipped == {}


def test_each_number_of_rows_has_the_rival_that_the_host_would_run_and_none_that_is_wrong(alone):
    timed, slow = [], rivals.Rival("pull", 1024, None, ["slow", "fast"])
    failing, missed = rival("failing", 1024), rival("missed", 1024)

    def missed_a_meeting():
        raise RuntimeError("a rank did not come")

    missed.check = missed_a_meeting

    def one_call(framework, one, spec, t):
        if one is failing:
            raise RuntimeError("no kernel")
        return (9.0 if one.name.startswith("wrong") else 0.5), b""

    def time(framework, spec, call, *_):
        timed.append(call.func.__self__.name)
        return 2.0 if call.args[0] == "slow" else 1.0

    found = [rival("wrong", 9), failing, missed, slow, rival("wrong above", 1025), rival("NCCL", 2048)]
    alone.setattr(tune_rank, "open_rivals", lambda *_: (found, {}))
    alone.setattr(tune_rank, "_tensors", lambda framework, spec, t: (t, None, None))
    alone.setattr(tune_rank, "_time", time)
    alone.setattr(tune_rank, "one_call", one_call)
    alone.setattr(tune_rank, "synchronize", lambda framework: None)
    times, told, skipped = tune_rank._unfused(None, SPEC, None, JOB)
    assert timed == ["missed"] * 2 + ["pull"] * 4 + ["NCCL"] * 2
    assert times == dict.fromkeys(JOB["rows"], 1.0), "the fastest norm counts"
    assert told == "pull up to 1024 rows, NCCL"
    assert "9.00 of the budget" in skipped["wrong"] and "9.00 of the budget" in skipped["wrong above"]
    assert "no kernel" in skipped["failing"] and "did not come" in skipped["missed"]


def host(monkeypatch, use, **more):
    """FastDeploy's modules, as far as they are called."""
    module = SimpleNamespace(custom_ar=True, **more)
    communication = types.SimpleNamespace(_TP_AR=None)

    @contextlib.contextmanager
    def capture_custom_allreduce():
        yield

    communication.capture_custom_allreduce = capture_custom_allreduce
    communication.tensor_model_parallel_all_reduce = lambda x, group: (x * 2, group)
    communication.use_custom_allreduce = use(communication)
    names = {
        "fastdeploy": SimpleNamespace(),
        "fastdeploy.envs": SimpleNamespace(FD_CUSTOM_AR_MAX_SIZE_MB=4),
        "fastdeploy.distributed.communication": communication,
        OWN: module,
    }
    for name, fake in names.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return communication, module


def by_group_and_limit(communication):
    def use_custom_allreduce(tp_group=None, custom_all_reduce_max_bytes=None):
        communication._TP_AR = SimpleNamespace(_initialized=True, asked=(tp_group, custom_all_reduce_max_bytes))

    return use_custom_allreduce


def test_the_hosts_own_is_opened_and_called(monkeypatch):
    communication, _ = host(monkeypatch, by_group_and_limit)
    own = custom_all_reduce.open_custom_all_reduce("group")
    assert communication._TP_AR.asked == ("group", 4 << 20) and own.limit == 4 << 20
    got, group = own.reduce(np.ones(2))
    assert got.tolist() == [2, 2] and group == "group" and own.capturing is communication.capture_custom_allreduce


def test_a_host_whose_own_all_reduce_is_off_is_no_rival(monkeypatch):
    def off(communication):
        def use_custom_allreduce(tp_group, custom_all_reduce_max_bytes):
            communication._TP_AR = SimpleNamespace(_initialized=False)

        return use_custom_allreduce

    _, module = host(monkeypatch, off)
    with pytest.raises(RuntimeError, match="does not take 3 ranks"):
        custom_all_reduce.open_custom_all_reduce(SimpleNamespace(nranks=3))
    module.custom_ar = False
    with pytest.raises(RuntimeError, match="not compiled"):
        custom_all_reduce.check_compiled()
