"""The provider of symmetric memory for CPU ranks: one POSIX shared-memory segment a rank.

A segment has a random name, belongs to its user alone, is really allocated (so a full /dev/shm is an error at
open and not a SIGBUS in a kernel), and loses its name as soon as every rank has mapped it. Its creator locks it
before it gets that name and holds the lock until it loses it; so a named segment without a lock was left by a run
that crashed, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")
_PREFIX = "fd_fusion-"
_YOUNG_S = 60  # a hidden segment younger than this may still be on its way to its lock and its name


class PosixShm:
    """Allocate, map and unmap segments of this process. Addresses are plain integers."""

    handle_bytes = 16
    free_waits_for_peers = False  # each process has its own mapping

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}  # address -> descriptor of a host page, for another process to map it
        self._maps: dict[int, mmap.mmap] = {}
        self._names: list[tuple[Path, int]] = []  # own segments that still have a name, and their descriptors

    def identity(self) -> dict[str, Any]:
        return {}

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Make a zeroed segment: its address in this process, the handle by which peers map it. Raises OSError."""
        remove_left()
        token = secrets.token_bytes(self.handle_bytes)
        hidden, path = _path(token, hidden=True), _path(token)
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._names.append((hidden, fd))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # before another process can take it for one that was left
            hidden.rename(path)
            self._names[-1] = path, fd
            os.posix_fallocate(fd, 0, nbytes)
            return self._map(fd, nbytes), token
        except OSError:
            self.opened_everywhere()
            raise

    def open(self, handle: bytes, nbytes: int) -> int:
        """Map a peer's segment. Raises OSError."""
        fd = os.open(_path(handle), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != nbytes:
                raise OSError("the peer's segment is not the one that it announced")
            return self._map(fd, nbytes)
        finally:
            os.close(fd)

    def opened_everywhere(self) -> None:
        """Remove the names, which no rank needs any more, so that nothing is left whatever happens next."""
        for path, fd in self._names:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            os.close(fd)
        self._names.clear()

    def close(self, address: int) -> None:
        self._maps.pop(address).close()

    def free(self, address: int) -> None:
        self.opened_everywhere()
        self.close(address)

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def fill(self, address: int, nbytes: int, byte: int = 0) -> None:
        ctypes.memset(address, byte, nbytes)

    def synchronize(self) -> None:
        """Do nothing: the interpreter runs nothing in the background."""

    def host_page(self, nbytes: int) -> tuple[int, int]:
        """Make a page for errors, cleared memory without a name: its address for the host and for the kernel, which
        are the same on a CPU. Raises OSError."""
        fd = os.memfd_create("fd_fusion", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        address = self._map(fd, nbytes)
        self.pages[address] = fd
        return address, address

    def free_host_page(self, address: int) -> None:
        self.close(address)
        os.close(self.pages.pop(address))

    def _map(self, fd: int, nbytes: int) -> int:
        mapped = mmap.mmap(fd, nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._maps[address] = mapped
        return address


def remove_left(since: float = 0) -> None:
    """Remove the segments of this user, made `since` then, that have a name and whose creator is gone."""
    for path in FOLDER.glob(f"*{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, removed by another rank, or another user's
            found = path.lstat()
            young = path.name.startswith(".") and time.time() - found.st_ctime < _YOUNG_S
            if found.st_uid != os.geteuid() or found.st_ctime < since or young:
                continue
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


def _path(token: bytes, *, hidden: bool = False) -> Path:
    return FOLDER / f"{'.' * hidden}{_PREFIX}{token.hex()}"
