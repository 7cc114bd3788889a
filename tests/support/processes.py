"""Whether a process runs, read from /proc."""

import contextlib
import os
from pathlib import Path


def alive(pid):
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
        # A dead main thread shows as Z while others still hold what the process has open, its locks too.
        return state(pid) != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def state(pid):
    """The letter of Linux: R, S, T (stopped), Z (ended) ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].strip()[:1]


def commands():
    """(id, words of the command line) of each process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield int(path.parent.name), path.read_bytes().decode(errors="replace").split("\0")


def rank_pid(folder, rank):
    """The id of the process that `run_ranks` started as this rank, with its files in `folder`."""
    for pid, words in commands():
        if words[-3:] == [str(folder), str(rank), ""]:
            return pid
    raise AssertionError(f"no rank {rank} of {folder} runs")
