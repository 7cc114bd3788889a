"""Rank script: rank 1 is stopped for half of the limit, and goes on; then it is stopped for good, and named.

Meanwhile rank 0 holds Python's lock, as Paddle does while it waits for an event on a GPU: no thread of it runs.
With "hangs", rank 1 runs but does not come, and a kernel of rank 0 says so on its error page.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time

from fd_fusion.comm import sentinel
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.presence import PresenceMemory
from fd_fusion.comm.symmetric_memory import barrier
from fd_fusion.kernels.all_reduce.error_page import ERROR_TIMED_OUT
from tests.support.ranks import this_group

LIMIT_S = 2.0
group = this_group()
meeting = PresenceMemory(group, timeout_s=30)
if group.rank == 1:
    group.store.set("pid", str(os.getpid()))
assert barrier(group, "here", 30)
log = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115
page, _ = (provider := PosixShm()).host_page(64)
reader = "fd_fusion.kernels.all_reduce.error_page:reason_of"
beside = sentinel.start(meeting, LIMIT_S, 0.3, log.name, [provider.pages[page]], reader)
if group.rank == 1:
    time.sleep(60)
    sys.exit("nobody ended this rank")
pid = int(group.store.get("pid"))
hold = ctypes.PyDLL(None).usleep  # with Python's lock
if "hangs" in sys.argv:
    first = ERROR_TIMED_OUT | 1 << (4 + 1) | 62 << 16  # rank 1 is missing in op 62
    (ctypes.c_int64 * 2).from_address(page)[:] = (first, 63)
else:
    os.kill(pid, signal.SIGSTOP)
    hold(int(LIMIT_S / 2 * 1e6))
    os.kill(pid, signal.SIGCONT)
    hold(int(LIMIT_S * 1e6))
    print("came back", flush=True)
    os.kill(pid, signal.SIGSTOP)
behind = f"while kill -0 {os.getpid()} 2>/dev/null; do sleep 0.1; done; "
behind += f"sed 's/^/log: /' {log.name}; rm {log.name}; kill -9 {pid}"
subprocess.Popen(["sh", "-c", behind])
for _ in range(30):
    hold(999_999)  # until the sentinel ends this process
sys.exit("the silent rank was not noticed")
