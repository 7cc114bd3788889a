"""What runs leave in shared memory. A segment of a rank that lives is locked: it may be of a test beside this one."""

import contextlib
import fcntl
import time

from fd_fusion.comm import posix_shm


def left():
    """The names of segments whose creator is gone."""
    found = set()
    for path in posix_shm.FOLDER.glob("fd_fusion-*"):
        with contextlib.suppress(OSError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found.add(path.name)
    return found


def none_left(before, timeout_s=20):
    """Whether nothing was left since; what ranks of another test leave, their parent is about to remove."""
    deadline = time.monotonic() + timeout_s
    while not left() <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
