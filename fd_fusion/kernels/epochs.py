"""What the epochs of the slots tell the host: how many rows the kernel has finished. Plain arithmetic, no Triton."""

from __future__ import annotations

import threading
from collections.abc import Sequence

_CYCLE = 2**32 - 2  # an epoch runs from 0 to 2^32 - 1 once, and then for ever from 2 to 2^32 - 1: `_next`


class Turns:
    """How often each slot was used since it was made, resets and wraps of the epochs included.

    `seen` must hear of a slot once in a cycle, which takes days; the metrics ask every minute.
    """

    def __init__(self, slots: int):
        self._turns = [0] * slots
        self._epochs: list[int] | None = [0] * slots  # when last seen
        self._lock = threading.Lock()

    def seen(self, epochs: Sequence[int]) -> list[int]:
        """The turns of each slot, now that its epoch is this."""
        with self._lock:
            if self._epochs is not None:
                grown = [(now - before) % _CYCLE for now, before in zip(epochs, self._epochs)]
                self._turns = [turns + more for turns, more in zip(self._turns, grown)]
                self._epochs = list(epochs)
            return self._turns

    def pause(self) -> None:
        """The epochs are about to become zero, or may be already: what they say counts for nothing."""
        with self._lock:
            self._epochs = None

    def start_anew(self) -> None:
        """All epochs are zero again."""
        with self._lock:
            self._epochs = [0] * len(self._turns)
