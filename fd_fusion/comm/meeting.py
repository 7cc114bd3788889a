"""How the ranks of a group come together again, whatever each of them has missed before.

A rank that raised, or came too late, has cast fewer ballots than the others: from then on its count is not theirs.
So every collective step that stands alone (a bind, the proving pass in a first forward, the reset of a workspace)
starts with a meeting. Rank 0 opens it, under a number from the store, and the others join the newest one; its ballots
are counted from zero.

A meeting has a label, which names its purpose. By it a rank that is late differs from one that left something out:

    the newest meeting            this rank
    open, of its label            joins
    open, of another label        joins, and the first vote shows the difference; but not if this rank has missed its
                                  own meeting, or has given up waiting for this one before
    ended                         waits for the next; if none comes, this one was its own, and this rank is late
"""

from __future__ import annotations

import time

from fd_fusion.comm.group import Group, Place, Signs, is_published, meeting_key, meetings_key, pauses, publish
from fd_fusion.reasons import FusionError, Reason, because


def convene(group: Group, label: str, *, timeout_s: float) -> Reason | None:
    """Collective: start a meeting. Returns None, or why this rank has to do without; then it must not vote.

    Raises: FusionError: the store is gone.
    """
    if group.size == 1 or group.store is None:
        return None
    try:
        return _open(group, label) if group.rank == 0 else _join(group, label, timeout_s)
    except Exception as error:  # each store has its own
        raise FusionError(because("no_store", detail=f"{type(error).__name__}: {error}")) from error


def _open(group: Group, label: str) -> None:
    number = group.store.add(meetings_key(group), 1)
    publish(group.store, _label_key(group, number), label)
    _enter(group.place, number)


def _join(group: Group, label: str, timeout_s: float) -> Reason | None:
    """Join, as another rank, a meeting newer than the last; wait for as long as rank 0 may take to open one."""
    place, late = group.place, False
    # Rank 0 may wait up to the limit for a third rank of another group, so it is given one limit more.
    patience, own = (Signs(group.store, group.ranks[0], limit) for limit in (2 * timeout_s, timeout_s))
    for pause in pauses():
        newest = group.store.add(meetings_key(group), 0)
        for number in range(place.meeting + 1, newest + 1):
            theirs = _label(group, number)
            if theirs is None and number == newest:
                break  # rank 0 is about to write it
            if number < newest or group.store.add(f"{meeting_key(group, number)}/ended", 0):
                late |= theirs == label
            elif theirs == label or not (late or theirs in place.given_up):
                return _enter(place, number)
            elif late:
                return because("never_voted", rank=group.rank, seconds=timeout_s)  # and this one is for a later call
            place.meeting = number
        if (own if late else patience).over():
            break
        time.sleep(pause)
    place.given_up.add(label)
    return because("never_voted", rank=group.rank if late else 0, seconds=timeout_s)


def _enter(place: Place, number: int) -> None:
    place.meeting, place.ballots = number, 0


def _label(group: Group, number: int) -> str | None:
    key = _label_key(group, number)
    if not is_published(group.store, key):
        return None
    text = group.store.get(key)
    return text.decode() if isinstance(text, bytes) else text


def _label_key(group: Group, number: int) -> str:
    return f"{meeting_key(group, number)}/label"
