"""Rank and size of a group, its place among the votes, and the sign of life of a rank that works."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fd_fusion.comm.waiting import Store, progress_key


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
