"""What a process holds open for its bound models: checked from any thread, counted, closed when the model is gone."""

import copy
import gc
import logging
import pickle
import threading
import weakref

import paddle
import pytest
from support.tiny import DemoDecoder

import fd_fusion
from fd_fusion.binding import bind as binding
from fd_fusion.binding import lifecycle
from fd_fusion.binding.bound import Book, Bound
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Verdict
from fd_fusion.config import FusionConfig, Resolved
from fd_fusion.reasons import FusionError, FusionTimeout, because, closed


class FakeOp:
    """A workspace of `nbytes`; `log` hears what is done to it."""

    def __init__(self, log, name="w", nbytes=10):
        self.log, self.name, self.bytes, self.error = log, name, nbytes, None

    def _do(self, what):
        self.log.append((what, self.name))
        if self.error is not None:
            raise FusionTimeout(because(self.error))

    def check(self):
        self._do("check")

    def freeze(self):
        self._do("freeze")

    def reset(self):
        self._do("reset")

    def close(self):
        self._do("close")


class Model:
    pass


GROUP = Group("g", 0, 2, (0, 1), None)


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(lifecycle, "_held", ())
    monkeypatch.setattr(lifecycle, "_opened_by", type(lifecycle._opened_by)())
    monkeypatch.setattr(binding, "_bound", Book())
    monkeypatch.setattr(binding.metrics, "tick", lambda *args, **kwargs: None)


def test_a_bind_in_another_thread_does_not_disturb_check():
    """It lies in between two workspaces here: the dictionary that was gone through changed its size."""
    log = []
    op = FakeOp(log)

    def check():
        lifecycle.hold(GROUP, FakeOp(log, "new"))
        binding._bound[model] = Bound(None)

    op.check, model = check, Model()
    lifecycle.hold(GROUP, op)
    lifecycle.hold(GROUP, FakeOp(log, "second"))
    try:
        binding.check()
    finally:
        binding._bound.pop(model)
    assert log == [("check", "second")]


def test_bind_enters_a_report_under_the_lock_that_report_holds():
    """`report` goes through the reports in the thread of the metrics, and a dictionary must not grow under it."""
    model, done = Model(), threading.Event()

    def bind():
        binding.bind(model, [], [], Resolved(None, "a test", because("not_asked")))
        done.set()

    with lifecycle.lock:
        thread = threading.Thread(target=bind)
        thread.start()
        assert not done.wait(0.2) and binding._bound.get(model) is None
    thread.join(10)
    assert done.is_set() and binding._bound.get(model).report.off.code == "not_asked"


def test_a_bound_model_that_its_layers_know_is_noticed_as_dropped():
    """By a parent reference, or a hook's closure: its state reached it, and the book held the state for ever."""
    model, state = paddle.nn.Sequential(paddle.nn.Linear(2, 2)), Bound(None)
    model[0].__dict__["parent"], before = [model], set(model.__dict__)
    state.sites = state.undo = [model[0]]
    binding._bound[model] = state
    assert binding._bound.get(model) is state and binding._bound.values() == [state]
    assert "_fd_fusion_state" not in str(model.state_dict().keys())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert binding._bound.get(other) is None and other.__dict__["_fd_fusion_state"] is None
    assert binding._bound.pop(model) is state and set(model.__dict__) == before and not binding._bound.values()
    binding._bound[model] = state
    log, alive = [], weakref.ref(model)
    lifecycle.hold(GROUP, FakeOp(log))
    lifecycle.watch_model(model, [lifecycle.held()[0].op])
    del model, state, other
    gc.collect()
    assert alive() is None and lifecycle.held()[0].dropped and not binding._bound.values()


def test_a_bind_keeps_no_model_alive():
    """With its report in the user's hands: a report of nothing that fuses holds no layer."""
    model = DemoDecoder(0, 1)
    model.norm.__dict__["parent"], alive = [model], weakref.ref(model)
    fd_fusion.bind(model, FusionConfig())
    assert [one.model for one in binding.report()].count("DemoDecoder") == 1
    del model
    gc.collect()
    assert alive() is None


def test_what_was_unbound_while_check_runs_is_no_error():
    log = []
    gone = FakeOp(log, "gone")
    gone.check = closed
    lifecycle.hold(GROUP, gone)
    lifecycle.hold(GROUP, FakeOp(log, "here"))
    binding.check()
    assert log == [("check", "here")]


def dropped_model(log, name="w", nbytes=10):
    model, op = Model(), FakeOp(log, name, nbytes)
    lifecycle.hold(GROUP, op)
    lifecycle.watch_model(model, [op])
    return model, op


def test_a_dropped_model_counts_until_all_ranks_have_dropped_it(monkeypatch, caplog):
    """Its error holds nobody's tokens up; it is named once; the next bind closes what both ranks have dropped."""
    log = []
    (first, one), (second, two), (third, _) = (dropped_model(log, name) for name in "abc")
    one.error = "aborted"
    peers = [[2, 3]]
    monkeypatch.setattr(lifecycle, "agree", lambda group, topic, vote, timeout_s: Verdict((vote.data, peers[0]), ()))
    first.itself, second.itself = first, second  # cycles
    del first, second
    gc.collect()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2
    assert "a bound Model was dropped without unbind: its workspace of 10 bytes" in caplog.text
    binding.check()
    assert log == [("check", "c")] and lifecycle.taken_bytes() == 30
    two.error = "aborted"  # cannot be closed in time: left to the end of the process, and no longer ours
    lifecycle.close_dropped([GROUP], 1.0)
    assert log[1:] == [("close", "b")] and lifecycle.taken_bytes() == 20, "the other rank still holds the first"
    peers[0] = [1, 2, 3]
    lifecycle.close_dropped([GROUP], 1.0)
    assert log[2:] == [("close", "a")] and lifecycle.taken_bytes() == 10 and third is not None


def test_a_group_that_opened_nothing_holds_no_vote(monkeypatch):
    monkeypatch.setattr(lifecycle, "agree", lambda *args, **kwargs: 1 / 0)
    lifecycle.close_dropped([GROUP], 1.0)


def test_an_unbound_model_that_goes_says_nothing(caplog):
    log = []
    model, op = dropped_model(log)
    lifecycle.close(op)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and not caplog.records


def test_reset_goes_through_all_workspaces_and_raises_the_first_error():
    """The other ranks wait for each of them; a dropped one takes part, since they may hold its model still."""
    log = []
    ops = [FakeOp(log, name) for name in "abc"]
    for one in ops:
        lifecycle.hold(GROUP, one)
    ops[0].error = "aborted"
    with pytest.raises(FusionError, match="another rank"):
        lifecycle.reset()
    assert log == [("reset", "a"), ("reset", "b"), ("reset", "c")]
    ops[0].error = None
    lifecycle.freeze()
    assert log[3:] == [("freeze", "a"), ("freeze", "b"), ("freeze", "c")]
