"""A small process beside each rank, which counts for it while it runs, and ends it when another rank is missing.

It is a process and no thread, since a rank that waits for a missing one may hold Python's lock for ever: Paddle does
so in the `synchronize` of an event or a stream, and then no thread of that rank runs any more, and no handler of a
signal. The sentinel needs nothing of its rank but its process id: it counts as long as the system says that the
process runs, and it ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fd_fusion.comm.presence import Meeting, presence_of
from fd_fusion.reasons import Reason

_EVERY_S = 0.05
_STOPPED = "TtZX"  # states in /proc/PID/stat: stopped, traced, ended
_ROOT = Path(__file__).parents[2]
_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from fd_fusion.comm import sentinel; sentinel.main(sys.argv[2])"


def start(meeting: Meeting, limit_s: float, grace_s: float, log: str | None) -> subprocess.Popen:
    """A sentinel for this process. It tells of a silent rank on stderr and in the file `log`, if there is one; when
    this process is still there `grace_s` later, it ends it.
    """
    facts = {
        "pid": os.getpid(),
        "descriptors": meeting.descriptors,
        "rank": meeting.group.rank,
        "ranks": meeting.group.ranks,
        "limit_s": limit_s,
        "grace_s": grace_s,
        "log": log,
    }
    # Isolated and without site: it starts in no time, and nobody's start-up files run in it.
    command = [sys.executable, "-I", "-S", "-c", _CODE, str(_ROOT), json.dumps(facts)]
    return subprocess.Popen(command, pass_fds=meeting.descriptors, stdin=subprocess.DEVNULL, stdout=2)


def main(text: str) -> None:
    """The sentinel itself."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it counts as long as its rank runs, and ends with it
    facts = json.loads(text)
    pid = facts["pid"]
    presence = presence_of(facts["descriptors"], facts["rank"], facts["ranks"])
    listen = presence.listener(facts["limit_s"])
    while os.getppid() == pid:
        if is_running(pid):
            presence.beat()
            if reason := listen():
                _tell(reason, facts["log"])
                _end(pid, facts["grace_s"])
                return
        else:
            listen = presence.listener(facts["limit_s"])  # a rank that stands still judges nobody
        time.sleep(_EVERY_S)


def is_running(pid: int) -> bool:
    """Whether the process is there and not stopped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in _STOPPED


def _tell(reason: Reason, log: str | None) -> None:
    sentence = f"fd_fusion: {reason}; {reason.remedy}; this process ends"
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())
    if log is not None:
        with contextlib.suppress(OSError), open(log, "a") as file:
            file.write(f"ERROR    {time.strftime('%Y-%m-%d %H:%M:%S')} {os.getppid()} sentinel {sentence}\n")


def _end(pid: int, grace_s: float) -> None:
    """The host may end its process by itself in the grace. Behind it no handler is asked: none could run."""
    deadline = time.monotonic() + grace_s
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(_EVERY_S)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)
