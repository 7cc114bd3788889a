"""The temporary folder of a run. Who starts the next run removes those of runs that were killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fd_fusion.cli.processes.signals import undisturbed

PREFIX = "fd_fusion_"
_ROOM_BYTES = 1 << 20
_LOCK = ".lock"  # held by the process whose folder it is; the kernel lets go when that one ends, however it ends


@contextlib.contextmanager
def run_folder(name: str = "") -> Iterator[Path]:
    """Make a folder under TMPDIR, removed at the end of the block. Raises: OSError: it cannot be made, or is full."""
    remove_old()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX + name))
    try:
        # A rank on a full disk would die without a sentence: its log is in this folder too.
        if shutil.disk_usage(folder).free < _ROOM_BYTES:
            text = "there is no room for a run; set TMPDIR to a folder with some"
            raise OSError(errno.ENOSPC, text, str(folder.parent))
        with open(folder / f"{_LOCK}.part", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(lock.name, folder / _LOCK)  # so it has its owner from the start
            yield folder
    finally:
        with undisturbed():
            shutil.rmtree(folder, ignore_errors=True)


def remove_old() -> None:
    """Remove the folders of this user whose owner is gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # its owner lives, or another process removes it in this moment
            if lock.parent.is_symlink() or lock.lstat().st_uid != os.geteuid():
                continue
            fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(fd)
