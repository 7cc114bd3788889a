"""Rank script: open symmetric memory over POSIX shared memory and do what the test asks for."""

import ctypes
import os
import signal
import sys

from fd_fusion.comm import posix_shm, symmetric_memory
from fd_fusion.reasons import FusionError
from tests.support.ranks import this_group

NBYTES = 1 << 16


def store(addresses, value):
    for address in addresses:
        (ctypes.c_int64 * 2).from_address(address)[:] = (value, value)


def lose(addresses, value):
    """A link that drops everything."""


class DeviceLike(posix_shm.PosixShm):
    """Closed in the order of device memory."""

    free_waits_for_peers = True


def full(*args):
    raise OSError(28, "No space left on device")


def main(what):
    group, push = this_group(), store
    provider = DeviceLike() if what.endswith("_device") else posix_shm.PosixShm()
    if what.startswith("lossy") and group.rank == 1:
        push = lose
    if what == "nameless" and group.rank == 1:
        provider.identity = lambda: open("/proc/not/there")
    if what.startswith("full") and group.rank == 1:
        os.posix_fallocate = full
    if what == "killed" and group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "killed_named" and group.rank == 1:  # dies while its segment still has a name
        posix_shm.PosixShm.open = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    try:
        memory = symmetric_memory.open_symmetric_memory(group, NBYTES, provider, push, timeout_s=2 if what.startswith("killed") else 30)
    except FusionError as error:
        print("refused:", error)
        assert not provider._maps, "what could not be opened is not given back"
        assert not symmetric_memory._lost, "a rank that was there was not seen at the close"
        return
    for peer, address in enumerate(memory.addresses):
        ctypes.c_int64.from_address(address + 4096 + 8 * group.rank).value = 100 * group.rank + peer
    assert symmetric_memory.barrier(group, "written", 10)
    found = [ctypes.c_int64.from_address(memory.own + 4096 + 8 * peer).value for peer in range(group.size)]
    assert found == [100 * peer + group.rank for peer in range(group.size)], found
    assert memory.provider.read(memory.own, 4096) == bytes(4096), "the proof left something behind"
    assert memory.close() and memory.close(), "closing twice"
    print("opened")


main(sys.argv[1])
