"""One thread a process that looks at the error pages of all workspaces.

A kernel that runs out of time writes its error into host memory; under graph replay no Python of ours runs,
so nobody else would look. The thread reads a word of each page every few milliseconds, which needs no GPU
call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

_EVERY_S = 0.01
_lock = threading.Lock()
_pages: dict[int, Callable[[], None]] = {}
_thread: threading.Thread | None = None


def watch(page: int, on_error: Callable[[], None]) -> None:
    """Call `on_error` once, from the watching thread, when the int64 at host address `page` is not 0."""
    global _thread
    with _lock:
        _pages[page] = on_error
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_look, name="fd_fusion-watcher", daemon=True)
            _thread.start()


def unwatch(page: int) -> None:
    """Stop looking at `page`: once this returns the page may be freed."""
    with _lock:
        _pages.pop(page, None)


def _look() -> None:
    pause = threading.Event()
    while not pause.wait(_EVERY_S):
        with _lock:
            if not _pages:
                return _stop()
            raised = [_pages.pop(page) for page in list(_pages) if ctypes.c_int64.from_address(page).value]
        for on_error in raised:
            on_error()


def _stop() -> None:
    """The last page is gone; called with the lock held, so that the next `watch` starts a new thread."""
    global _thread
    _thread = None
