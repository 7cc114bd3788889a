"""Rank script: the life of a workspace, with a layout of its own and no kernel: the test plays the kernel."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading

from fd_fusion.comm import posix_shm, watcher, workspace
from fd_fusion.comm.symmetric_memory import barrier
from fd_fusion.reasons import FusionError, FusionTimeout, because
from tests.support.ranks import this_group

LAYOUT = workspace.Layout(
    control_bytes=256,
    symmetric_bytes=1000,
    fill=0xFF,
    local_bytes=64,
    local_words=lambda limit, page, addresses: [limit, page, *addresses],
    page_bytes=64,
    read_error=lambda words: because("dead_group", op=1, row=words[0], launch=3, missing=0) if words[0] else None,
)


def store(addresses, value):
    for address in addresses:
        (ctypes.c_int64 * 2).from_address(address)[:] = (value, value)


def open_one(group, timeout_s=20):
    made = workspace.open_workspace(group, LAYOUT, posix_shm.PosixShm(), store, timeout_s=30)
    made.timeout_s = timeout_s
    return made


def raises(kind, action):
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def word(address):
    return ctypes.c_int64.from_address(address)


def life(group):
    """Filled as the layout says; frozen; failed, noticed by the watcher and by check; reset; closed twice."""
    records = []
    logging.getLogger("fd_fusion").addFilter(lambda record: records.append(record) or True)
    made = open_one(group)
    own = made.memory.own
    assert made.memory.provider.read(own, 256) == bytes(256)
    assert made.memory.provider.read(own + 256, 744) == b"\xff" * 744
    assert word(made.local).value == 300_000_000_000, "ten times the limit before freeze()"
    made.check()
    made.freeze()
    assert word(made.local).value == 20_000_000_000
    page = word(made.local + 8).value
    assert barrier(group, "looked", 30)
    if group.rank == 0:
        word(page).value = 7  # a kernel of rank 0 runs out of time and tells all ranks
        for address in made.memory.addresses:
            ctypes.c_int32.from_address(address).value = 1
        assert _until(lambda: any("row 7" in record.getMessage() for record in records)), "no watcher noticed it"
        assert "row 7" in raises(FusionTimeout, made.check)
    else:
        assert _until(lambda: ctypes.c_int32.from_address(own).value)
        said, handler = [], logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        workspace.log.addHandler(handler)
        assert "another rank ran out of time" in raises(FusionTimeout, made.check)
        assert ["another rank ran out of time" in line for line in said] == [True], "told before it is raised"
    made.reset()
    made.check()
    assert made.generation == 1 and made.error() is None and word(made.local).value == 20_000_000_000
    made.close()
    made.close()
    assert "closed" in raises(FusionError, made.check)
    again = open_one(group)
    again.check()
    again.close()


def several(group):
    """Two workspaces of one group at once, closed in opposite orders by the two ranks."""
    first, second = open_one(group), open_one(group)
    word(first.memory.addresses[1 - group.rank] + 512).value = 5
    assert word(second.memory.own + 512).value == -1
    for one in (first, second) if group.rank else (second, first):
        one.close()


def lost(group):
    """A rank is gone: reset says so in bounded time, and the workspace stays dead."""
    made = open_one(group, timeout_s=1)
    made.freeze()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert "rank 1 never voted" in raises(FusionError, made.reset)


def lost_in_reset(group):
    """A rank dies between the two votes of a reset: the others have cleared their memory, and must not look well."""
    made = open_one(group, timeout_s=4)
    made.freeze()
    if group.rank == 1:
        made._fill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        made.reset()
    assert "rank 1 never voted" in raises(FusionError, made.reset)
    assert "another rank ran out of time" in raises(FusionTimeout, made.check)
    made.close()
    for action in (made.freeze, made.reset, made.check):
        assert "closed" in raises(FusionError, action)


def fork(group):
    """A forked child that ends leaves its parent's workspace alone."""
    made = open_one(group)
    if os.fork() == 0:
        workspace.close_all()
        os._exit(0)
    os.wait()
    made.check()
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def left_open(group):
    """Ends with an open workspace: the hook at exit closes it."""
    open_one(group)


def _until(look):
    pause = threading.Event()
    return any(look() or pause.wait(0.01) for _ in range(3000))


print("start")
globals()[sys.argv[1]](this_group())
print("end", flush=True)
