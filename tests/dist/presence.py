"""Rank script: rank 1 is stopped for half of the limit, and goes on; then it is stopped for good, and named."""

import os
import signal
import subprocess
import sys
import time

from fd_fusion.comm import watcher
from fd_fusion.comm.presence import open_presence
from fd_fusion.comm.symmetric_memory import barrier
from tests.support.ranks import this_group

LIMIT_S = 2.0
group = this_group()
presence = open_presence(group, LIMIT_S, timeout_s=30)
if group.rank == 1:
    group.store.set("pid", str(os.getpid()))
assert barrier(group, "here", 30)
watcher.end_process_on_error(0.1)
presence.watch(lambda reason: print(reason, flush=True))
if group.rank == 1:
    time.sleep(60)
    sys.exit("nobody ended this rank")
pid = int(group.store.get("pid"))
os.kill(pid, signal.SIGSTOP)
time.sleep(LIMIT_S / 2)
os.kill(pid, signal.SIGCONT)
time.sleep(LIMIT_S)
print("came back", flush=True)
os.kill(pid, signal.SIGSTOP)
behind = f"while kill -0 {os.getpid()} 2>/dev/null; do sleep 0.1; done; kill -9 {pid}"
subprocess.Popen(["sh", "-c", behind], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
time.sleep(30)  # until the watching thread ends this process
sys.exit("the silent rank was not noticed")
