"""What the kernel counts on the device, as the host tells it: since open, through resets. No Triton."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


class Counts:
    """Counters that start anew at a reset."""

    def __init__(self, counters: int):
        self._before = self._last = [0] * counters  # at the last reset; when last seen
        self._paused = False
        self._lock = threading.Lock()

    def seen(self, read: Callable[[], Sequence[int]]) -> list[int]:
        """What has been counted since open. `read` gives the counters as they are now; no two reads overlap, and none
        lasts into a pause, so that no total ever falls."""
        with self._lock:
            if not self._paused:
                self._last = [before + now for before, now in zip(self._before, read())]
            return self._last

    def pause(self) -> None:
        """The counters are about to become zero, or may be already: what they say counts for nothing."""
        with self._lock:
            self._paused = True

    def start_anew(self) -> None:
        """All counters are zero again."""
        with self._lock:
            self._before, self._paused = self._last, False
