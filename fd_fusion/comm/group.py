"""Rank and size of a group, its place among the votes, signs of life, and waiting through a store in bounded time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

_PATIENCE = 10  # a rank that shows progress is waited for this many times the limit
_POLL_S = (0.001, 0.05)  # first and longest pause between two reads of the store


class Store(Protocol):
    """What a vote needs of a store. `get` is called only for a key that is known to be set."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes | str: ...
    def add(self, key: str, amount: int) -> int: ...


@dataclass
class Place:
    """Where a rank stands: its last meeting, the ballots that it has cast in it, and what it waited for in vain."""

    meeting: int = 0
    ballots: int = 0
    given_up: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Group:
    """The ranks that reduce together. `rank` and `size` are of the group, `ranks` are the global ranks.

    `name` is this group's alone in the job and the same on all its ranks.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    store: Store | None
    handle: Any = field(default=None, compare=False, repr=False)  # the framework's own process group, if any
    place: Place = field(default_factory=Place, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or len(self.ranks) != self.size:
            raise ValueError(f"group {self.name!r}: rank {self.rank} of {self.size}, global ranks {self.ranks}")

    def next_ballot(self, topic: str) -> str:
        """Return the prefix of the next vote's keys: equal on all ranks, since voting is collective and in order."""
        number, self.place.ballots = self.place.ballots, self.place.ballots + 1
        return f"{meeting_key(self, self.place.meeting)}/{number}/{topic}"


@contextlib.contextmanager
def working(group: Group, *, timeout_s: float = 30.0) -> Iterator[None]:
    """Show progress to the group while this rank compiles or allocates, so that it is waited for longer.

    Args: timeout_s: the limit of the votes in which the others wait; there are several signs in that time.
    """
    if group.store is None or group.size == 1:
        yield
        return
    stop, every_s = threading.Event(), max(0.02, min(1.0, timeout_s / 4))

    def beat() -> None:
        with contextlib.suppress(Exception):  # the next vote raises for a store that is gone
            while not stop.wait(every_s):
                group.store.add(progress_key(group.ranks[group.rank]), 1)

    thread = threading.Thread(target=beat, name="fd_fusion-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def meetings_key(group: Group) -> str:
    """Return the key of the number of meetings that rank 0 has opened."""
    return f"fd_fusion/{group.name}/meetings"


def meeting_key(group: Group, number: int) -> str:
    return f"fd_fusion/{group.name}/{number}"


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
