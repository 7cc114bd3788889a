"""Add up the counters of the kernel from the opening of a workspace on, through its resets. No Triton."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


class Counts:
    """Totals of counters that start anew at a reset."""

    def __init__(self, counters: int):
        self._at_reset = self._totals = [0] * counters  # at the last reset; at the last read
        self._paused = False
        self._lock = threading.Lock()

    def read(self, counters: Callable[[], Sequence[int]]) -> list[int]:
        """Return the totals. `counters` returns the counters as they are now; no two reads overlap, and no read lasts
        into a pause, so that no total ever falls."""
        with self._lock:
            if not self._paused:
                self._totals = [before + now for before, now in zip(self._at_reset, counters())]
            return self._totals

    def pause(self) -> None:
        """Ignore the counters: they are about to become zero, or may be zero already."""
        with self._lock:
            self._paused = True

    def start_anew(self) -> None:
        """Read the counters again: all are zero."""
        with self._lock:
            self._at_reset, self._paused = self._totals, False
