"""How the ranks of a group agree: all or none, with a reason, in bounded time.

The votes move as small JSON texts through a key-value store (Paddle's TCPStore, torch's, or one of the tests'),
so a vote needs neither NCCL nor a new process group, and unpickles nothing. Group rank 0 gathers the votes and
writes one verdict; every other rank reads that verdict. So two ranks cannot come to two conclusions because one
of them read the store a moment earlier. A rank that waits in vain for rank 0 seals the ballot first, with an atomic
add, and rank 0, should it come late after all, finds the seal and calls the vote off too.

Ballots are counted by each rank itself, from the last meeting on (`meeting.convene`), where all ranks start at zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fd_fusion.comm.group import (
    Group,
    Signs,
    is_published,
    meeting_key,
    meetings_key,
    progress_key,
    publish,
    wait_for,
    working,
)
from fd_fusion.reasons import FusionError, Reason, because, refused_by

_SEAL = 1 << 20  # a waiter's mark on the ballot; rank 0's own mark is 1, so both fit into one counter


@dataclass(frozen=True)
class Vote:
    """What one rank states: a refusal or, with none, a yes; and data for the others (JSON types only)."""

    refusal: Reason | None = None
    data: Any = None


@dataclass(frozen=True)
class Verdict:
    """The same on every rank: the data of all ranks in rank order, and the refusals of some of them.

    missing: the ranks whose vote did not come in time; each has a refusal too.
    """

    data: tuple[Any, ...]
    refusals: tuple[tuple[int, Reason], ...]
    missing: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def reason(self) -> Reason | None:
        """Return the first refusal, naming its rank, or the one that an earlier vote named. All are in `refusals`.

        A refusal that all ranks state alike names no rank: all of them found it together.
        """
        if self.ok:
            return None
        rank, why = self.refusals[0]
        if len(self.refusals) == len(self.data) and all(other == why for _, other in self.refusals):
            return why
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
        with working(group, timeout_s=timeout_s):  # a rank that waits is alive: ranks of its other groups wait for it
            group.store.add(progress_key(group.ranks[group.rank]), 1)
            publish(group.store, f"{ballot}/vote/{group.rank}", json.dumps(text))
            return (_gather if group.rank == 0 else _await_verdict)(group, ballot, timeout_s)
    except (FusionError, AssertionError):
        raise
    except Exception as error:  # each store has its own
        raise FusionError(because("no_store", detail=f"{type(error).__name__}: {error}")) from error


def _gather(group: Group, ballot: str, timeout_s: float) -> Verdict:
    """Collect the votes as rank 0, decide, write the verdict."""
    keys = {rank: f"{ballot}/vote/{rank}" for rank in range(group.size)}
    signs = {rank: Signs(group.store, group.ranks[rank], timeout_s) for rank in keys}
    missing = wait_for(lambda rank: is_published(group.store, keys[rank]), signs)
    group.store.add(f"{meeting_key(group, group.place.meeting)}/ended", 1)  # for a rank that has yet to join
    votes = [
        Vote(because("never_voted", rank=rank, seconds=timeout_s)) if rank in missing else _read(group, rank, key)
        for rank, key in keys.items()
    ]
    refusals = [(rank, vote.refusal) for rank, vote in enumerate(votes) if vote.refusal is not None]
    if group.store.add(f"{ballot}/seal", 1) >= _SEAL:
        refusals.insert(0, (0, because("gave_up", rank=0)))  # a rank already runs without this vote
        missing.add(0)
    verdict = Verdict(tuple(vote.data for vote in votes), tuple(refusals), tuple(sorted(missing)))
    text = {
        "data": verdict.data,
        "refusals": [[rank, why.to_dict()] for rank, why in refusals],
        "missing": verdict.missing,
    }
    publish(group.store, f"{ballot}/verdict", json.dumps(text))
    return verdict


def _read(group: Group, rank: int, key: str) -> Vote:
    """Read the vote of a rank; one that cannot be read, from a rank of another version, is a refusal."""
    text = group.store.get(key)
    try:
        vote = json.loads(text)
        return Vote(Reason.from_dict(vote["refusal"]) if vote["refusal"] else None, vote["data"])
    except (ValueError, KeyError, TypeError) as error:
        return Vote(_unreadable(rank, "vote", error))


def _unreadable(rank: int, what: str, error: Exception) -> Reason:
    detail = f"its {what} cannot be read: {type(error).__name__}: {error}"
    return because("structure_differs", rank=rank, detail=detail)


def _await_verdict(group: Group, ballot: str, timeout_s: float) -> Verdict:
    """Read the verdict as another rank, or seal the ballot if rank 0 shows no sign of life."""
    key, meetings = f"{ballot}/verdict", meetings_key(group)

    def is_over(_: int) -> bool:
        """The verdict is there, or rank 0 has raised and is at another meeting: then it will never be."""
        return is_published(group.store, key) or group.store.add(meetings, 0) > group.place.meeting

    # Rank 0 may itself be waiting up to the limit for a third rank, so it is given one limit more.
    missing = wait_for(is_over, {0: Signs(group.store, group.ranks[0], 2 * timeout_s)})
    if missing and group.store.add(f"{ballot}/seal", _SEAL) % _SEAL:
        missing = wait_for(is_over, {0: Signs(group.store, group.ranks[0], timeout_s)})  # it is just about to publish
    if missing or not is_published(group.store, key):
        return Verdict((None,) * group.size, ((0, because("never_voted", rank=0, seconds=timeout_s)),), (0,))
    text = group.store.get(key)
    try:
        verdict = json.loads(text)
        refusals = tuple((rank, Reason.from_dict(why)) for rank, why in verdict["refusals"])
        return Verdict(tuple(verdict["data"]), refusals, tuple(verdict["missing"]))
    except (ValueError, KeyError, TypeError) as error:
        return Verdict((None,) * group.size, ((0, _unreadable(0, "verdict", error)),), (0,))
