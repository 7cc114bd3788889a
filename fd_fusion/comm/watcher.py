"""One thread a process that looks at the error pages of all workspaces.

A kernel that runs out of time writes its error into host memory; under graph replay no Python of ours runs,
so nobody else would look. Looking reads a few words every few milliseconds and needs no GPU call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_EVERY_S = 0.01
_lock = threading.RLock()  # a SIGTERM handler may close a workspace while its thread is in here
_watched: dict[Any, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
_thread: threading.Thread | None = None


def watch(key: Any, look: Callable[[], Any], on_error: Callable[[Any], None]) -> None:
    """When `look()` is no longer None, call `on_error` with what it gave: once, from the watching thread."""
    global _thread
    with _lock:
        _watched[key] = look, on_error
        if _thread is None:
            _thread = threading.Thread(target=_run, name="fd_fusion-watcher", daemon=True)
            _thread.start()


def unwatch(key: Any) -> None:
    """Stop looking: once this returns, what `look` reads may be freed."""
    with _lock:
        _watched.pop(key, None)


def _run() -> None:
    global _thread
    pause = threading.Event()
    while not pause.wait(_EVERY_S):
        raised = []
        with _lock:
            if not _watched:
                _thread = None  # under the lock, so that the next `watch` starts another thread
                return
            for key, (look, on_error) in list(_watched.items()):
                if (error := look()) is not None:
                    raised.append((on_error, error))
                    del _watched[key]
        for on_error, error in raised:
            on_error(error)
