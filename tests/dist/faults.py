"""Rank script: what goes wrong in a running job, and how every rank must learn of it.

faults.py WHAT ... [--device gpu] ...     WHAT: a function below; the last rank is the faulty one
"""

import os
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import triton_calls as calls

from fd_fusion.comm import cuda_ipc, posix_shm, watcher, workspace
from fd_fusion.comm.symmetric_memory import barrier
from fd_fusion.reasons import FusionError, FusionTimeout
from tests.support import tensors
from tests.support.all_reduce_cases import Case
from tests.support.processes import alive

SHORT_S = 2  # the limit of a call that must run out of time; the others have the long one of `triton_calls`


def _case(group, options, seed=0):
    return Case(group.size, 3, options.hidden, seed=seed)


def _faulty(group):
    return group.rank == group.size - 1


def _patience(op, seconds):
    """From now on a call waits this long."""
    op._workspace.timeout_s = seconds
    op.freeze()


def _must_raise(op, case, group, options):
    """A call that must not return numbers: it raises, or it returns NaN and `check` raises. Returns the error."""
    try:
        outputs = calls.call(op, case, group.rank, options.device)
        tensors.synchronize(options.device)
        for bits in outputs:
            values = tensors.from_bits(bits, case.dtype)
            assert (values != values).all(), "finite numbers after the error"
        op.check()
    except FusionTimeout as error:
        return str(error)
    raise AssertionError("no FusionTimeout")


def late(group, options):
    """The last rank comes late to a call that the others gave up: all raise, reset together, and go on."""
    watched, watch = threading.Semaphore(0), watcher.watch  # one up for each error that the watcher finds
    watcher.watch = lambda owner, read, on_error: watch(owner, read, lambda why: (watched.release(), on_error(why)))
    op = calls.open_op(group, _case(group, options), options)
    calls.check(op, _case(group, options), group.rank, options.device)
    for generation in (1, 2):
        _patience(op, SHORT_S)
        if _faulty(group):
            time.sleep(SHORT_S + 1.5)
        start = time.monotonic()
        text = _must_raise(op, _case(group, options, 1), group, options)
        assert time.monotonic() - start < SHORT_S + 20, "the wait is not bounded"
        if not _faulty(group):
            assert f"missing rank {group.size - 1}" in text or "another rank" in text, text
        assert watched.acquire(timeout=20), "the watcher has not noticed"
        print(_must_raise(op, _case(group, options, 2), group, options))  # dead until the reset
        _patience(op, options.timeout_s)
        op.reset()
        for seed in range(3):
            calls.check(op, _case(group, options, seed), group.rank, options.device)
        assert op.stats()["generation"] == generation
    op.close()
    op.close()


def by_two_shot(group, options):
    """The owner of the row misses the last rank; the one between waits for the owner, and began before it. The last
    rank is the one to name, by both."""
    options.two_shot_rows = 1
    case = Case(group.size, 1, options.hidden)
    op = calls.open_op(group, case, options)
    limit_s = 4 * SHORT_S  # a quarter of it is what the owner may be later, and the machine may be busy
    _patience(op, limit_s)
    assert barrier(group, "ready", 60)
    if not _faulty(group):
        time.sleep(0 if group.rank else limit_s / 8)
        text = _must_raise(op, case, group, options)
        assert f"missing rank {group.size - 1}" in text or "another rank" in text, text
        print(text)
    assert barrier(group, "given up", 60)
    op.close()


def paused(group, options):
    """The whole machine stops in the middle of a call, for longer than the limit, as when it is suspended. Nobody is
    missing: time in which the waiting process itself did not run is not counted. Interpreter only."""
    op = calls.open_op(group, _case(group, options), options)
    limit_s = 2 * SHORT_S
    _patience(op, limit_s)
    calls.check(op, _case(group, options), group.rank, options.device)
    go_on = f"sleep {0.5 + limit_s + 2}; kill -CONT {os.getpid()}"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    with subprocess.Popen(["sh", "-c", go_on]):
        if _faulty(group):
            time.sleep(0.7)  # ends while all are stopped
            time.sleep(0.7)  # what the others still wait for
        start = time.monotonic()
        calls.check(op, _case(group, options, 1), group.rank, options.device)
        assert _faulty(group) or time.monotonic() - start > limit_s, "nobody was stopped"
    op.close()


def early(group, options):
    """A rank that only checks, and calls nothing, learns of the others' error too."""
    op = calls.open_op(group, _case(group, options), options)
    _patience(op, SHORT_S)
    if not _faulty(group):
        _must_raise(op, _case(group, options), group, options)
    assert barrier(group, "given up", 30)
    try:
        op.check()
    except FusionTimeout as error:
        assert not _faulty(group) or "another rank" in str(error), error
    else:
        raise AssertionError("check said nothing")
    op.close()


def _killed(group, options, *, after):
    op = calls.open_op(group, _case(group, options), options)
    if after:
        calls.check(op, _case(group, options), group.rank, options.device)
    _patience(op, SHORT_S)
    if _faulty(group):
        os.kill(os.getpid(), signal.SIGKILL)
    print(_must_raise(op, _case(group, options, 1), group, options))
    start = time.monotonic()
    op.close()
    assert time.monotonic() - start < 20, "close waits for a dead rank"


def killed_before(group, options):
    _killed(group, options, after=False)


def killed_after(group, options):
    _killed(group, options, after=True)


def killed_in(group, options):
    """Killed while it waits inside a call. What it had pushed arrives; what it had not is missed, in this call or
    in the next."""
    op = calls.open_op(group, _case(group, options), options)
    op.freeze()
    if _faulty(group):
        group.store.set("to be killed", str(os.getpid()))
        assert barrier(group, "victim named", 60)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        calls.call(op, _case(group, options), group.rank, options.device)
        tensors.synchronize(options.device)
        raise AssertionError("nobody else called, yet it returned")
    assert barrier(group, "victim named", 60)
    victim = int(group.store.get("to be killed"))
    while alive(victim):
        time.sleep(0.05)
    _patience(op, SHORT_S)
    try:
        calls.check(op, _case(group, options), group.rank, options.device)
    except FusionTimeout as error:
        print(error)
    else:
        print(_must_raise(op, _case(group, options), group, options))
    op.close()


def no_triton(group, options):
    """The last rank cannot import Triton: all ranks refuse, and say which one and why."""
    supports = calls.backend.supports
    if _faulty(group):
        sys.modules["triton"] = None
        calls.backend.supports = lambda spec: None  # as if it had been there when bind asked
    _refused(group, options, "Triton cannot be imported")
    if _faulty(group):
        del sys.modules["triton"]
        calls.backend.supports = supports


def full_memory(group, options):
    """There is no room for the last rank's memory."""
    on_gpu = options.device == "gpu"
    if _faulty(group):

        def full(*args):
            raise OSError(28, "No space left on device")

        os.posix_fallocate = full
        allocate = cuda_ipc.CudaIpc.allocate
        cuda_ipc.CudaIpc.allocate = lambda provider, nbytes: allocate(provider, 1 << 50)
    _refused(group, options, "CUDA_ERROR_OUT_OF_MEMORY" if on_gpu else "No space left on device")


def imported_before(group, options):
    """The last rank's process has imported Triton in the other mode."""
    if _faulty(group):
        import triton.language  # noqa: F401
    _refused(group, options, "TRITON_INTERPRET=1")


def _refused(group, options, expected):
    try:
        calls.open_op(group, _case(group, options), options)
    except FusionError as error:
        assert expected in str(error) and f"rank {group.size - 1}" in str(error), error
    else:
        raise AssertionError("it opened")
    assert barrier(group, f"refused: {expected}", 30)
    assert not list(posix_shm.FOLDER.glob("*fd_fusion-*"))


def exit_in_step(group, options):
    """The last rank ends, in order, while the others wait for it."""
    op = calls.open_op(group, _case(group, options), options)
    calls.check(op, _case(group, options), group.rank, options.device)
    if _faulty(group):
        sys.exit(0)
    _patience(op, SHORT_S)
    print(_must_raise(op, _case(group, options, 1), group, options))


if __name__ == "__main__":
    calls.__dict__.update({name: value for name, value in globals().items() if callable(value) and name[0] != "_"})
    calls.main()
