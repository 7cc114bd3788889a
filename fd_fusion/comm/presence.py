"""Signs of life: every rank of a group counts up in memory that its peers see, so that a silent rank has a name.

A kernel that waits in vain says so by itself. But a rank can be missing while nobody waits in a kernel of ours: in a
collective of the host, in its barrier between two steps, when the server is idle. The watching thread of each rank
beats every few milliseconds, and a rank whose count has stood still for `limit_s` is missing. A rank that is late
but lives goes on beating, however long its step takes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from fd_fusion.comm import watcher
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.symmetric_memory import SymmetricMemory, open_symmetric_memory
from fd_fusion.reasons import Reason, because

_BYTES = 4096
# Time between two looks counts for so long at most: a machine that was suspended, or a process that did not get to
# run, has heard nothing from anybody, and that is nobody's silence.
_LOOK_S = 0.5
_LEFT = -1  # the count of a rank that closed


class Presence:
    """The counts of all ranks of a group. `look` beats, and names the first rank that is silent."""

    def __init__(self, memory: SymmetricMemory, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self._memory, self._limit_s, self._clock = memory, limit_s, clock
        self._counts = [ctypes.c_int64.from_address(address) for address in memory.addresses]
        self._heard = [0] * len(self._counts)  # the count of each rank when it was last seen to move
        self._silent_s = [0.0] * len(self._counts)
        self._last = clock()
        self._closed = False

    def look(self) -> Reason | None:
        rank, now = self._memory.group.rank, self._clock()
        passed, self._last = min(now - self._last, _LOOK_S), now
        self._counts[rank].value += 1
        for peer, count in enumerate(self._counts):
            value = count.value
            if peer == rank or value == _LEFT or value != self._heard[peer]:
                self._heard[peer], self._silent_s[peer] = value, 0.0
                continue
            self._silent_s[peer] += passed
            if self._silent_s[peer] > self._limit_s:
                return because("silent_rank", rank=self._memory.group.ranks[peer], seconds=f"{self._limit_s:g}")
        return None

    def watch(self, on_silence: Callable[[Reason], Any]) -> None:
        """Look from now on, in the watching thread of this process."""
        watcher.watch(self, self.look, on_silence)

    def close(self) -> None:
        """Leave, without waiting for anybody; may be repeated."""
        if self._closed:
            return
        self._closed = True
        watcher.unwatch(self)
        self._counts[self._memory.group.rank].value = _LEFT
        self._memory.close(wait=False)


def open_presence(group: Group, limit_s: float, *, timeout_s: float) -> Presence:
    """Collective. `limit_s`: how long a rank may be silent. Raises: FusionError: on all ranks alike."""
    return Presence(open_symmetric_memory(group, _BYTES, PosixShm(), _store, timeout_s=timeout_s), limit_s)


def _store(addresses: tuple[int, ...], value: int) -> None:
    for address in addresses:
        (ctypes.c_int64 * 2).from_address(address)[:] = (value, value)
