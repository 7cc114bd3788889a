"""Waiting for another process through a store, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

_PATIENCE = 10  # a rank that shows progress is waited for this many times the limit
_POLL_S = (0.001, 0.05)  # first and longest pause between two reads of the store


class Store(Protocol):
    """What a vote needs of a store. `get` is called only for a key that is known to be set."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes | str: ...
    def add(self, key: str, amount: int) -> int: ...


class Signs:
    """Whether to go on waiting for a process: up to the limit, and longer while the process shows progress."""

    def __init__(self, store: Store, process: int, timeout_s: float):
        self._store, self._key, self._timeout_s = store, progress_key(process), timeout_s
        self._start = self._last = time.monotonic()
        self._count = store.add(self._key, 0)

    def over(self) -> bool:
        now, count = time.monotonic(), self._store.add(self._key, 0)
        if count != self._count:
            self._count, self._last = count, now
        return now - self._last > self._timeout_s or now - self._start > _PATIENCE * self._timeout_s


def wait_for(is_there: Callable[[int], bool], signs: dict[int, Signs]) -> set[int]:
    """Wait for each of these ranks until it is there, or its `Signs` are over. Returns the missing ranks."""
    waiting, missing = set(signs), set()
    for pause in pauses():
        for rank in sorted(waiting):
            if is_there(rank):
                waiting.discard(rank)
            elif signs[rank].over():
                waiting.discard(rank)
                missing.add(rank)
        if not waiting:
            return missing
        time.sleep(pause)


def pauses() -> Iterator[float]:
    """Yield the seconds between two reads of the store: short ones first."""
    pause = _POLL_S[0]
    while True:
        yield pause
        pause = min(2 * pause, _POLL_S[1])


def publish(store: Store, key: str, text: str) -> None:
    """Set the value, then the mark that it is set: `get` of a key that is not set would block."""
    store.set(key, text)
    store.add(f"{key}/set", 1)


def is_published(store: Store, key: str) -> bool:
    return store.add(f"{key}/set", 0) > 0


def progress_key(process: int) -> str:
    """Return the key of a process (its global rank), not of a group: it may be at work for another of its groups."""
    return f"fd_fusion/progress/{process}"
