"""A small process beside each rank, which counts for it while it runs, and ends it when another rank is missing.

It is a process and no thread, since a rank that waits for a missing one may hold Python's lock for ever: Paddle does
so in the `synchronize` of an event or a stream, and then no thread of that rank runs any more, and no handler of a
signal. The sentinel needs nothing of its rank but the process id and the error pages: it counts as long as the
process runs, it reads what a kernel that waited in vain has written, and it ends with its rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fd_fusion.comm.presence import PresenceMemory, presence_of
from fd_fusion.reasons import Reason

_EVERY_S = 0.05
_STOPPED = "TtZX"  # states in /proc/PID/stat: stopped, traced, ended
_ROOT = Path(__file__).parents[2]
_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from fd_fusion.comm import sentinel; sentinel.main(sys.argv[2])"


def start(
    memory: PresenceMemory,
    limit_s: float,
    grace_s: float,
    log: str | None,
    pages: Sequence[int] = (),
    reader: str = "",
) -> subprocess.Popen:
    """Start a sentinel for this process. The sentinel names a silent rank on stderr and in the file `log`, if there
    is one; when this process still runs `grace_s` later, the sentinel ends it.

    pages: descriptors of error pages. reader: "module:function" that makes a reason of the int64 words of a page.
    """
    facts = {
        "pid": os.getpid(),
        "descriptors": memory.descriptors,
        "rank": memory.group.rank,
        "ranks": memory.group.ranks,
        "limit_s": limit_s,
        "grace_s": grace_s,
        "log": log,
        "pages": list(pages),
        "reader": reader,
    }
    # Isolated and without site: the process starts at once, and runs no start-up files of the user.
    command = [sys.executable, "-I", "-S", "-c", _CODE, str(_ROOT), json.dumps(facts)]
    return subprocess.Popen(command, pass_fds=[*memory.descriptors, *pages], stdin=subprocess.DEVNULL, stdout=2)


def main(text: str) -> None:
    """Run the sentinel."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it counts as long as its rank runs, and ends with it
    facts = json.loads(text)
    pid = facts["pid"]
    presence = presence_of(facts["descriptors"], facts["rank"], facts["ranks"])
    silent_rank, error = presence.silence_check(facts["limit_s"]), _reader(facts["pages"], facts["reader"])
    while os.getppid() == pid:
        if is_running(pid):
            presence.beat()
            if reason := silent_rank():
                _write(reason, facts["log"])
                return _end(pid, facts["grace_s"])
            # The rank's own threads log the error, where they can run.
            if error() and not _ends_within(pid, facts["grace_s"]):
                _write(error(), facts["log"])
                return _end(pid, 0.0)
        else:
            silent_rank = presence.silence_check(facts["limit_s"])  # a rank that stands still names no other
        time.sleep(_EVERY_S)


def is_running(pid: int) -> bool:
    """Return whether the process is there and not stopped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in _STOPPED


def _write(reason: Reason, log: str | None) -> None:
    sentence = f"fd_fusion: {reason}; {reason.remedy}; this process ends"
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())
    if log is not None:
        with contextlib.suppress(OSError), open(log, "a") as file:
            file.write(f"ERROR    {time.strftime('%Y-%m-%d %H:%M:%S')} {os.getppid()} sentinel {sentence}\n")


def _reader(pages: Sequence[int], name: str) -> Callable[[], Reason | None]:
    """Return a function that reads the error on the first page that holds one."""
    mapped = [memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("q") for fd in pages]
    module, _, function = name.partition(":")
    read = getattr(importlib.import_module(module), function) if name else None
    return lambda: next((read(list(words)) for words in mapped if any(words[:8])), None)


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(_EVERY_S)
    return os.getppid() != pid


def _end(pid: int, grace_s: float) -> None:
    """Kill the process if it has not ended within `grace_s`: no handler of a signal could run."""
    if not _ends_within(pid, grace_s):
        os.kill(pid, signal.SIGKILL)
