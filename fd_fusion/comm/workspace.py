"""The memory of one fused op: opened together, watched, frozen before capture, reset and closed together.

A workspace belongs to one (group, hidden size, dtype) and to one order of calls. What lies where in it is the
kernel's business and comes as a `Layout`; this module decides when that memory is filled, read and given back.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from fd_fusion.comm import watcher
from fd_fusion.comm.group import Group
from fd_fusion.comm.meeting import convene
from fd_fusion.comm.symmetric_memory import (
    MemoryProvider,
    Push,
    SymmetricMemory,
    agree_or_raise,
    as_refusal,
    on_all_ranks,
    open_symmetric_memory,
    whole_lines,
)
from fd_fusion.reasons import FusionError, FusionTimeout, Reason, because

log = logging.getLogger("fd_fusion")
WARM_UP = 10  # the limit on waiting before freeze(), in timeouts: a rank may still be compiling
_open: list[Workspace] = []


@dataclass(frozen=True)
class Layout:
    """What the kernel takes in memory. All sizes are of one rank."""

    control_bytes: int  # zeroed, at the start of the symmetric memory
    symmetric_bytes: int  # control page and slots
    fill: int  # the byte that fills the slots before the first call
    local_bytes: int  # memory that only the own kernel addresses
    local_words: Callable[
        [int, int, list[int]], list[int]
    ]  # (limit in ns, error page, addresses) -> its first content
    page_bytes: int
    read_error: Callable[[list[int]], Reason | None]  # the error that the words of the error page hold


class Workspace:
    """Symmetric memory, local memory and an error page. `local` is the address that the kernel takes."""

    def __init__(self, memory: SymmetricMemory, layout: Layout, timeout_s: float):
        self.memory, self.layout, self.timeout_s = memory, layout, timeout_s
        self.local = memory.own + whole_lines(layout.symmetric_bytes)
        self.generation = 0
        self.frozen = False
        self._logged = False  # the error, by the watcher or by `fail`
        self._pid = os.getpid()
        self._page, self._page_of_kernel = memory.provider.host_page(layout.page_bytes)
        self._words = (ctypes.c_int64 * (layout.page_bytes // 8)).from_address(self._page)
        self.closed = False
        self._use = threading.RLock()  # held while memory is read, so that no other thread gives it back meanwhile

    @property
    def bytes(self) -> int:
        return self.memory.nbytes

    @property
    def page(self) -> int | None:
        """Return a descriptor of the error page, for another process to map it; None where it has none."""
        return self.memory.provider.pages.get(self._page)

    def error(self) -> Reason | None:
        """Return what kernels of this rank wrote on the error page, or None. Cheap: reads host memory."""
        with self._use:
            return self.layout.read_error(self._words[:]) if not self.closed and any(self._words) else None

    def read(self, address: int, nbytes: int) -> bytes:
        """Read what lies at an address of this workspace. Raises: FusionError: it is closed."""
        with self._use:
            self._need_open()
            return self.memory.provider.read(address, nbytes)

    def check(self) -> None:
        """Raise if a call ran out of time; for results of calls that have ended, before they leave the process.

        Raises: FusionTimeout: a call ran out of time, on this rank or on another. A rank that was merely late, and
        started no call since, has an empty error page; there the abort word is read.
        """
        self._need_open()
        reason = self.error()
        if reason is None and any(self.read(self.memory.own, 4)):
            reason = self.error() or because("aborted")
        if reason is not None:
            self.fail(reason)

    def fail(self, reason: Reason) -> NoReturn:
        """Log the error, then raise FusionTimeout: its handler may end the process before the watcher logs."""
        self._on_error(reason)
        raise FusionTimeout(reason)

    def freeze(self) -> None:
        """End the warm-up: from now on a call waits `timeout_s`, and nothing allocates."""
        with self._use:
            self._need_open()
            self.frozen = True
            self.memory.provider.write(self.local, self._limit().to_bytes(8, "little"))

    def reset(self) -> None:
        """Collective: make the workspace usable again after an error, on all ranks or on none.

        Raises: FusionError: a rank is missing; the workspace stays dead.
        """
        self._need_open()
        group, patience = self.memory.group, (1 if self.frozen else WARM_UP) * self.timeout_s
        label = f"reset {self.memory.nonce} {self.generation}"
        if (reason := convene(group, label, timeout_s=patience)) is not None:  # the others find this rank missing
            raise FusionError(reason)
        _, refusal = as_refusal(self.memory.provider.synchronize)  # no rank clears what a kernel may still write
        labels = agree_or_raise(group, "reset", refusal, label, 2 * patience)
        if others := [rank for rank, other in enumerate(labels) if other != labels[0]]:
            raise FusionError(because("structure_differs", rank=others[0], detail="it resets another workspace"))
        on_all_ranks(group, "cleared", self._fill, patience, undo=self._abort)
        self.generation += 1
        self._watch()

    def close(self, *, wait: bool = True) -> None:
        """Give everything back; may be repeated. Waits a few seconds for the other ranks, never longer."""
        with self._use:  # not longer: the watcher holds its own lock while it reads
            if self.closed or os.getpid() != self._pid:  # a forked child owns nothing of this
                return
            self.closed = True
        watcher.unwatch(self)
        if self in _open:
            _open.remove(self)
        if self.memory.close(wait=wait):  # otherwise a kernel may still write its error
            self.memory.provider.free_host_page(self._page)

    def _abort(self) -> None:
        self.memory.provider.write(self.memory.own, (1).to_bytes(4, "little"))  # the abort word

    def _need_open(self) -> None:
        if self.closed:
            raise FusionError(because("closed"))

    def _limit(self) -> int:
        return int((1 if self.frozen else WARM_UP) * self.timeout_s * 1e9)

    def _fill(self) -> None:
        memory, layout = self.memory, self.layout
        memory.provider.fill(memory.own, layout.control_bytes)
        slots = layout.symmetric_bytes - layout.control_bytes
        memory.provider.fill(memory.own + layout.control_bytes, slots, layout.fill)
        words = layout.local_words(self._limit(), self._page_of_kernel, list(memory.addresses))
        memory.provider.write(self.local, b"".join(word.to_bytes(8, "little", signed=True) for word in words))
        memory.provider.synchronize()
        ctypes.memset(self._page, 0, layout.page_bytes)
        self._logged = False

    def _watch(self) -> None:
        watcher.watch(self, self.error, self._on_error)

    def _on_error(self, reason: Reason) -> None:
        if not self._logged:
            self._logged = True
            log.error("rank %d of group %s: %s", self.memory.group.rank, self.memory.group.name, reason)


def open_workspace(
    group: Group, layout: Layout, provider: MemoryProvider, push: Push, *, timeout_s: float
) -> Workspace:
    """Collective: allocate, exchange, prove and fill. Before capture; afterwards no address of it moves.

    Raises: FusionError: on all ranks alike.
    """
    nbytes = whole_lines(layout.symmetric_bytes) + layout.local_bytes
    memory = open_symmetric_memory(group, nbytes, provider, push, timeout_s=timeout_s)
    made, refusal = as_refusal(lambda: Workspace(memory, layout, timeout_s))
    if made is not None:
        _, refusal = as_refusal(made._fill)
    try:
        agree_or_raise(group, "filled", refusal, None, timeout_s)
    except FusionError:
        (made or memory).close()
        raise
    _open.append(made)
    made._watch()
    return made


@atexit.register
def close_all() -> None:
    """Close every workspace of this process, oldest first: the same order on all ranks."""
    for workspace in list(_open):
        workspace.close()
