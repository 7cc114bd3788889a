"""The circle of a model: all ranks that its groups tie together, directly or through one another.

What counts for the whole model (the proof, an error that a user insisted on) must end alike on all of these ranks,
and one group's vote does not reach the others. So the ranks first exchange, in rounds, which groups each is in;
then the circle is a group like any other, with one ballot for one question, however the groups overlap.

A rank cannot know how many rounds the others need, and has no need of that number: each group's own verdict, which is
the same on all its ranks, shows whether the group holds one more round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fd_fusion.comm.group import Group, Place
from fd_fusion.comm.meeting import convene
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.reasons import Reason

Known = dict[str, list[list]]  # global rank -> [name, global ranks, meeting] of each of its groups


def in_order(groups: Sequence[Group]) -> list[Group]:
    """Sort the groups so that no two ranks wait for each other crosswise: every rank goes through its groups so."""
    return sorted(groups, key=lambda group: (group.size, group.ranks, group.name))


def meet(labels: Mapping[Group, str], *, timeout_s: float) -> tuple[Known, Reason | None, list[Group]]:
    """Collective: come together in each group, whatever a rank has missed before, and learn who is tied together.

    What one rank has missed is its refusal in every group that still holds a vote.
    Args: labels: what each group meets for, see `meeting`.
    Returns: (who is in which groups, why this rank does not know all of it or None, the groups that hold votes).
    Raises: FusionError: the store is gone.
    """
    live, refusal = [], None
    for group in in_order(list(labels)):
        reason = convene(group, labels[group], timeout_s=timeout_s)
        refusal = refusal or reason
        live += [group] if reason is None else []
    own = [[one.name, list(one.ranks), one.place.meeting] for one in live]
    known: Known = {str(one.ranks[one.rank]): own for one in live[:1]}
    waiting = list(live)
    while waiting:
        for group in list(waiting):
            verdict = agree(group, "circle", Vote(refusal, known), timeout_s=timeout_s)
            gathered: Known = {}
            for data in verdict.data:
                gathered.update(data or {})
            known = {**known, **gathered}
            refusal = refusal or verdict.reason
            if not verdict.ok or _is_whole(gathered):
                waiting.remove(group)
            if verdict.missing:
                live.remove(group)
    return known, refusal, live


def circle_of(groups: Sequence[Group], known: Known, open_names: set[str] | None = None) -> Group | None:
    """Return the circle of this rank as a group; None where it has no group. `open_names`: the groups that count."""
    mine = [group for group in in_order(groups) if open_names is None or group.name in open_names]
    if not mine:
        return None
    own_rank = mine[0].ranks[mine[0].rank]
    ranks, names = {own_rank}, []
    while True:
        found = [
            one
            for rank in sorted(ranks)
            for one in known.get(str(rank), ())
            if open_names is None or one[0] in open_names
        ]
        names = sorted({f"{name}:{meeting}" for name, _, meeting in found})
        more = ranks.union(*(members for _, members, _ in found))
        if more == ranks:
            break
        ranks = more
    for group in mine:
        if set(group.ranks) == ranks:
            return group
    ordered = tuple(sorted(ranks))
    changed = {"rank": ordered.index(own_rank), "size": len(ordered), "ranks": ordered}
    return dataclasses.replace(mine[0], name="circle/" + "+".join(names), **changed, handle=None, place=Place())


def _is_whole(gathered: Known) -> bool:
    """Return whether the groups of every rank that is in one of these groups have been gathered."""
    return all(str(rank) in gathered for groups in gathered.values() for _, ranks, _ in groups for rank in ranks)
