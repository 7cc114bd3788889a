"""Ends the process when FlashInfer's kernel waits for a peer for too long. Its wait has no end of its own.

The kernel counts its blocks in the first word of its control block, and clears the word when a call ends, which
also moves a flag. So a control block that stays the same and is not idle is a call that hangs, under graph replay
too, where no Python of ours runs. One thread reads it, with a copy on a stream of its own; another one
judges, since a read can itself be stuck behind what hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable

from fd_fusion.backends.flashinfer.workspace import CONTROL_INTS
from fd_fusion.comm.cuda_driver import CudaDriver, CudaError
from fd_fusion.comm.watcher import end_process  # the kernel cannot be recalled: only the end of the process ends it

Words = tuple[int, ...]


class Watchdog:
    """Call `end` once `read` has shown the same running call, or nothing at all, for `limit_s`.

    Time is counted in reads, so a process that was stopped for a while is not taken for one that hangs.
    """

    def __init__(
        self, read: Callable[[], Words], what: str, limit_s: float, *, end: Callable[[str], None] = end_process
    ):
        self._read, self._what, self._end = read, what, end
        self.limit_s = limit_s
        self._every_s = min(0.25, limit_s / 8)
        self._signs = 0  # how often a read found the kernel idle, or further on
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=f"fd_fusion-flashinfer-{run.__name__[1:]}", daemon=True)
            for run in (self._read_often, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def idle_within(self, seconds: float) -> bool:
        """Return whether the running call, if there is one, ends within `seconds`."""
        for _ in range(max(1, int(seconds / self._every_s))):
            signs = self._signs
            if self._stop.wait(self._every_s) or not self._threads[0].is_alive():
                return False
            if self._signs != signs and self._idle:
                return True
        return False

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(1.0)

    _idle = False

    def _read_often(self) -> None:
        last: Words = ()
        while not self._stop.wait(self._every_s):
            try:
                words = self._read()
            except RuntimeError:  # the context is broken or gone; the call that broke it raises
                self._stop.set()
                return
            self._idle = words[0] == 0
            if self._idle or words != last:
                self._signs += 1
            last = words

    def _judge(self) -> None:
        last, reads = -1, 0
        while not self._stop.wait(self._every_s):
            last, reads = (last, reads + 1) if last == self._signs else (self._signs, 0)
            if reads * self._every_s > self.limit_s:
                limit = f"{self.limit_s:g} s"
                self._end(f"{self._what} has waited for another rank for {limit}; this process ends with it")
                return


class ControlReader:
    """Read a control block while kernels run: a copy on a stream of its own, allowed during a graph capture."""

    def __init__(self, address: int):
        self._cuda, self._address, self._host = CudaDriver(), address, ctypes.c_void_p()
        self._cuda.make_stream()
        self._cuda.call("cuMemHostAlloc", ctypes.byref(self._host), ctypes.c_size_t(4 * CONTROL_INTS), 1)  # portable

    def __call__(self) -> Words:
        self._cuda.read(self._address, 4 * CONTROL_INTS, self._host)
        return tuple((ctypes.c_int * CONTROL_INTS).from_address(self._host.value))

    def close(self) -> None:
        """Free stream and memory once no thread reads any more. With a broken context both are gone already."""
        with contextlib.suppress(CudaError):
            self._cuda.drop_stream()
        with contextlib.suppress(CudaError):
            self._cuda.call("cuMemFreeHost", self._host)
