"""One thread a process that reads the error pages of all workspaces.

A kernel that runs out of time writes its error into host memory; under graph replay no other Python of ours runs that
could read it. The thread reads a few words every few milliseconds and needs no GPU call.

In a server an error must also end the process: its main thread may hang in a collective of the host, which cannot be
called back, and then only the end of the process shows the launcher, and so the server, that a rank is missing.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from typing import Any

EXIT_STATUS = 75
_EVERY_S = 0.01
_grace_s: float | None = None
_lock = threading.RLock()  # a SIGTERM handler may close a workspace while the handler's thread holds this lock
_watched: dict[Any, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
_thread: threading.Thread | None = None
_stopped = threading.Event()


def watch(key: Any, read_error: Callable[[], Any], on_error: Callable[[Any], None]) -> None:
    """Call `on_error` with the error when `read_error()` is no longer None: once, from the watching thread."""
    global _thread
    with _lock:
        _watched[key] = read_error, on_error
        if _thread is None:
            _thread = threading.Thread(target=_run, name="fd_fusion-watcher", daemon=True)
            _thread.start()


def unwatch(key: Any) -> None:
    """Read no more: once this returns, what `read_error` reads may be freed."""
    with _lock:
        _watched.pop(key, None)


def end_process_on_error(grace_s: float | None) -> None:
    """End this process on an error from now on, `grace_s` after it was read; None: no more.

    In that time the host may end the process by itself, with a traceback and its own exit handlers.
    """
    global _grace_s
    _grace_s = grace_s


def end_process(message: str) -> None:
    """Print why, and end this process at once: to the launcher this rank died, instead of falling silent."""
    os.write(2, f"fd_fusion: {message}\n".encode())
    os._exit(EXIT_STATUS)


@atexit.register
def _stop() -> None:
    """Let the thread end before the interpreter takes itself down; a forked process has none."""
    if (thread := _thread) is not None and thread.is_alive():
        _stopped.set()
        thread.join(1.0)


def _run() -> None:
    global _thread
    while not _stopped.wait(_EVERY_S):
        raised = []
        with _lock:
            if not _watched:
                _thread = None  # under the lock, so that the next `watch` starts another thread
                return
            for key, (read_error, on_error) in list(_watched.items()):
                if (error := read_error()) is not None:
                    raised.append((on_error, error))
                    del _watched[key]
        for on_error, error in raised:
            if _grace_s is not None:  # before anything else: `on_error` may take a while, or fail
                timer = threading.Timer(_grace_s, end_process, [f"{error}; this process ends"])
                timer.daemon = True
                timer.start()
            on_error(error)
