"""Rank and size of a group, and how its ranks agree: all or none, with a reason, in bounded time.

The votes move as small JSON texts through a key-value store (Paddle's TCPStore, torch's, or one of the tests'),
so a vote needs neither NCCL nor a new process group, and unpickles nothing. Group rank 0 gathers the votes and
writes one verdict; every other rank reads that verdict. So two ranks cannot come to two conclusions because one
of them looked a moment earlier. A rank that waits in vain for rank 0 seals the ballot first, with an atomic
add, and rank 0, should it come late after all, finds the seal and calls the vote off too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fd_fusion.reasons import FusionError, Reason, because, refused_by

_SEAL = 1 << 20  # a waiter's mark on the ballot; rank 0's own mark is 1, so both fit into one counter
_PATIENCE = 10  # a rank that shows progress is waited for this many times the limit
_POLL_S = (0.001, 0.05)  # first and longest pause between two looks at the store


class Store(Protocol):
    """What a vote needs of a store. `get` is called only for a key that is known to be set."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes | str: ...
    def add(self, key: str, amount: int) -> int: ...


@dataclass(frozen=True)
class Group:
    """The ranks that reduce together. `rank` and `size` are of the group, `ranks` are the global ranks.

    `name` tells this group from any other of the job and is the same on all its ranks.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    store: Store | None
    handle: Any = field(default=None, compare=False, repr=False)  # the framework's own process group, if any
    _ballots: Any = field(default_factory=itertools.count, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or len(self.ranks) != self.size:
            raise ValueError(f"group {self.name!r}: rank {self.rank} of {self.size}, global ranks {self.ranks}")

    def next_ballot(self, topic: str) -> str:
        """The prefix of the next vote's keys: equal on all ranks, since voting is collective and in order."""
        return f"fd_fusion/{self.name}/{next(self._ballots)}/{topic}"


@dataclass(frozen=True)
class Vote:
    """What one rank states: a refusal or, with none, a yes; and data for the others (JSON types only)."""

    refusal: Reason | None = None
    data: Any = None


@dataclass(frozen=True)
class Verdict:
    """The same on every rank: the data of all ranks in rank order, and the refusals of some of them."""

    data: tuple[Any, ...]
    refusals: tuple[tuple[int, Reason], ...]

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def reason(self) -> Reason | None:
        """The first refusal, naming its rank, or the one that an earlier vote named. All are in `refusals`."""
        if self.ok:
            return None
        rank, why = self.refusals[0]
        return why if why.code in ("never_voted", "gave_up", "refused") else refused_by(rank, why)


def agree(group: Group, topic: str, vote: Vote, *, timeout_s: float) -> Verdict:
    """Collective: state `vote`, get the verdict of the whole group. Bounded in time, never raises for a silent peer.

    Args:
        timeout_s: how long a silent rank is waited for, in seconds. A rank inside `working` is waited for up to
            ten times as long, as long as it shows progress.
    Returns: the verdict, equal on all ranks. A rank that never voted is a refusal that names it. If rank 0 itself
        is missing, the others agree on that.
    Raises: FusionError: the store is gone, as it is with the process that serves it.
    """
    if group.size == 1:
        return Verdict((vote.data,), () if vote.refusal is None else ((0, vote.refusal),))
    if group.store is None:
        return Verdict((None,) * group.size, ((group.rank, because("no_store", detail="none was given")),))
    ballot = group.next_ballot(topic)
    text = {"refusal": vote.refusal.to_dict() if vote.refusal else None, "data": vote.data}
    try:
        _publish(group.store, f"{ballot}/vote/{group.rank}", json.dumps(text))
        return (_gather if group.rank == 0 else _await_verdict)(group, ballot, timeout_s)
    except Exception as error:  # each store has its own
        raise FusionError(because("no_store", detail=f"{type(error).__name__}: {error}")) from error


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
        with contextlib.suppress(Exception):  # a store that is gone is told by the next vote
            while not stop.wait(every_s):
                group.store.add(_progress_key(group, group.rank), 1)

    thread = threading.Thread(target=beat, name="fd_fusion-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _gather(group: Group, ballot: str, timeout_s: float) -> Verdict:
    """Rank 0: collect the votes, decide, write the verdict."""
    keys = {rank: f"{ballot}/vote/{rank}" for rank in range(group.size)}
    with working(group, timeout_s=timeout_s):
        missing = _wait_for(group, keys, timeout_s)
    votes = {rank: json.loads(group.store.get(key)) for rank, key in keys.items() if rank not in missing}
    refusals = []
    for rank in range(group.size):
        if rank in missing:
            refusals.append((rank, because("never_voted", rank=rank, seconds=timeout_s)))
        elif votes[rank]["refusal"]:
            refusals.append((rank, Reason.from_dict(votes[rank]["refusal"])))
    if group.store.add(f"{ballot}/seal", 1) >= _SEAL:
        refusals.insert(0, (0, because("gave_up", rank=0)))  # somebody already runs without this vote
    data = [votes[rank]["data"] if rank in votes else None for rank in range(group.size)]
    text = {"data": data, "refusals": [[rank, why.to_dict()] for rank, why in refusals]}
    _publish(group.store, f"{ballot}/verdict", json.dumps(text))
    return Verdict(tuple(data), tuple(refusals))


def _await_verdict(group: Group, ballot: str, timeout_s: float) -> Verdict:
    """Another rank: read the verdict, or seal the ballot if rank 0 shows no sign of life."""
    key = f"{ballot}/verdict"
    # Rank 0 may itself be waiting up to the limit for a third rank, so it is given one limit more.
    missing = _wait_for(group, {0: key}, 2 * timeout_s)
    if missing and group.store.add(f"{ballot}/seal", _SEAL) % _SEAL:
        missing = _wait_for(group, {0: key}, timeout_s)  # rank 0 was just about to write it
    if missing:
        return Verdict((None,) * group.size, ((0, because("never_voted", rank=0, seconds=timeout_s)),))
    text = json.loads(group.store.get(key))
    return Verdict(tuple(text["data"]), tuple((rank, Reason.from_dict(why)) for rank, why in text["refusals"]))


def _wait_for(group: Group, keys: dict[int, str], timeout_s: float) -> set[int]:
    """Wait until each rank has published its key, longer while it shows progress. Returns the missing ranks."""
    start = time.monotonic()
    last_sign = dict.fromkeys(keys, start)
    progress = {rank: group.store.add(_progress_key(group, rank), 0) for rank in keys}
    waiting, missing = set(keys), set()
    pause = _POLL_S[0]
    while True:
        for rank in sorted(waiting):
            if group.store.add(f"{keys[rank]}/set", 0):
                waiting.discard(rank)
                continue
            now = time.monotonic()
            seen = group.store.add(_progress_key(group, rank), 0)
            if seen != progress[rank]:
                progress[rank], last_sign[rank] = seen, now
            if now - last_sign[rank] > timeout_s or now - start > _PATIENCE * timeout_s:
                waiting.discard(rank)
                missing.add(rank)
        if not waiting:
            return missing
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1])


def _publish(store: Store, key: str, text: str) -> None:
    """Set the value, then the mark that says so: `get` of a key that is not set would block."""
    store.set(key, text)
    store.add(f"{key}/set", 1)


def _progress_key(group: Group, rank: int) -> str:
    return f"fd_fusion/{group.name}/progress/{rank}"
