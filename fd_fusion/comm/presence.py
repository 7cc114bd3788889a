"""Signs of life: every rank of a group counts up in memory that its peers see, so that a silent rank has a name.

A kernel that waits in vain writes its own error. But a rank can be missing while no kernel of ours waits: in a
collective of the host, in its barrier between two steps, when the server is idle. A rank whose count has stood still
for `limit_s` is missing; one that is late but runs goes on counting, however long its step takes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.symmetric_memory import open_symmetric_memory
from fd_fusion.reasons import Reason, because

PAGE_BYTES = 4096
# Time between two reads counts for so long at most: a machine that was suspended, or a process that did not get to
# run, has read no counts meanwhile, and that is no rank's silence.
_READ_S = 0.5
_LEFT = -1  # the count of a rank that left in order


class Presence:
    """The counts of all ranks of a group, as one of its ranks sees them."""

    def __init__(self, counts: Sequence[Any], rank: int, ranks: Sequence[int]):
        """counts: a ctypes.c_int64 of each rank. rank: this one, in the group. ranks: the global ranks."""
        self._counts, self._rank, self._ranks = counts, rank, ranks

    def beat(self) -> None:
        if self._counts[self._rank].value != _LEFT:
            self._counts[self._rank].value += 1

    def leave(self) -> None:
        self._counts[self._rank].value = _LEFT

    def silence_check(
        self, limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> Callable[[], Reason | None]:
        """Return a function to call again and again: it names the first rank that is silent for `limit_s`."""
        last_counts, silent_s = [0] * len(self._counts), [0.0] * len(self._counts)
        last = clock()

        def check() -> Reason | None:
            nonlocal last
            now = clock()
            passed, last = min(now - last, _READ_S), now
            for peer, count in enumerate(self._counts):
                value = count.value
                if peer == self._rank or value == _LEFT or value != last_counts[peer]:
                    last_counts[peer], silent_s[peer] = value, 0.0
                    continue
                silent_s[peer] += passed
                if silent_s[peer] > limit_s:
                    return because("silent_rank", rank=self._ranks[peer], seconds=f"{limit_s:g}")
            return None

        return check


class PresenceMemory:
    """The memory behind a `Presence`, and a descriptor of each rank's page, for another process to map it.

    Collective. Raises: FusionError: on all ranks alike.
    """

    def __init__(self, group: Group, timeout_s: float):
        self.group, provider = group, _Kept()
        self._memory = open_symmetric_memory(group, PAGE_BYTES, provider, _store, timeout_s=timeout_s)
        self.descriptors = [provider.descriptors[address] for address in self._memory.addresses]
        counts = [ctypes.c_int64.from_address(address) for address in self._memory.addresses]
        self.presence = Presence(counts, group.rank, group.ranks)


def presence_of(descriptors: Sequence[int], rank: int, ranks: Sequence[int]) -> Presence:
    """Return the counts in another process, from its own copies of the descriptors."""
    return Presence([ctypes.c_int64.from_buffer(mmap.mmap(fd, PAGE_BYTES)) for fd in descriptors], rank, ranks)


class _Kept(PosixShm):
    """Keep a descriptor of what is mapped: the names of the segments are removed."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptors: dict[int, int] = {}

    def _map(self, fd: int, nbytes: int) -> int:
        address = super()._map(fd, nbytes)
        self.descriptors[address] = os.dup(fd)
        return address


def _store(addresses: tuple[int, ...], value: int) -> None:
    for address in addresses:
        (ctypes.c_int64 * 2).from_address(address)[:] = (value, value)
