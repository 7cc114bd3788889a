"""The votes of the proving pass: what a forward showed on each rank becomes one outcome on all of them.

A forward of the pass holds the host's own collectives, which pair by their order alone. A rank that leaves one in the
middle while the others go on is out of step with them for good: its next all-reduce would be paired with one of
theirs that is long past, and every sum would be wrong with no error. So each rank votes how far it came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fd_fusion.binding.proof import Proof, vacuous
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Verdict, Vote, agree
from fd_fusion.reasons import Reason, because


@dataclass
class Ballot:
    """One rank's conclusions on a forward of the pass, which a vote makes those of all ranks.

    which, raised: the forward, and what it raised on this rank. reached: the pairs whose norms it came to. again: why
    it showed nothing. differs: whether the outputs of some rank differ. linked: whether some rank has residuals
    that may stay with their owners; links: the pairs of this rank that leave theirs.
    """

    refusal: Reason | None = None
    ranks: tuple[int, ...] = ()
    again: Reason | None = None
    differs: bool = False
    linked: bool = False
    links: Collection[str] = ()
    which: str = ""
    raised: Reason | None = None
    reached: Collection[str] = ()

    @property
    def goes_on(self) -> bool:
        return self.refusal is None and self.again is None

    @property
    def is_out_of_step(self) -> bool:
        return self.refusal is not None and self.refusal.root.code == "out_of_step"

    def data(self) -> dict[str, Any]:
        """Return what this rank states beside a refusal."""
        return {"again": self.again and self.again.to_dict(), "differs": self.differs, "linked": self.linked}

    def refuse(self, reason: Reason, ranks: tuple[int, ...]) -> None:
        self.refusal, self.ranks = reason, ranks

    def conclude(self, ranks: Sequence[dict[str, Any]], proof: Proof | None = None) -> None:
        """Conclude from the data of all ranks of a group, none of which refused: the same on each of them."""
        self.differs = self.differs or any(data["differs"] for data in ranks)
        self.linked = self.linked or any(data["linked"] for data in ranks)
        if any(data.get("links") != ranks[0].get("links") for data in ranks):
            self.refusal = because("residual_read", why="the ranks do not link the same pairs")
        for data in ranks:
            self.again = self.again or (data["again"] and Reason.from_dict(data["again"]))
        words = [data.get("words") for data in ranks]
        if proof is not None and all(words) and self.again is None:
            self.refusal = proof.joint_refusal(words)
            self.again = None if self.refusal else vacuous(words)


def vote(
    ballot: Ballot, names: dict[Group, list[str]], circle: Group, timeout_s: float, proof: Proof | None = None
) -> None:
    """Collective: make the ballot one outcome for all ranks of all groups of the model.

    What the ranks of a group compare, each group compares; the outcome is one ballot of the whole circle. So every
    rank casts the same ballots in each group, whatever it found and however the groups overlap.
    Args: names: of the pairs of each group.
    """
    for group, own in names.items():
        shown = proof.words if proof is not None and ballot.goes_on else {}
        data = {"words": {name: shown[name] for name in own if name in shown} or None, **ballot.data()}
        data["raised"] = ballot.raised and ballot.raised.to_dict()
        data["links"] = [name for name in own if name in ballot.links]
        data["reached"] = len(set(own) & set(ballot.reached))
        verdict = agree(group, "proof", Vote(ballot.refusal, data), timeout_s=timeout_s)
        if ballot.is_out_of_step:
            continue
        if reason := _out_of_step(ballot.which, group, data, verdict):
            ballot.refuse(reason, verdict.missing)
        elif verdict.ok:  # a rank that refuses does so once more, in the vote of the whole circle
            ballot.conclude(verdict.data, proof)
    verdict = agree(circle, "outcome", Vote(ballot.refusal, ballot.data()), timeout_s=timeout_s)
    if ballot.is_out_of_step:
        return
    if verdict.ok:
        ballot.again = None  # from now on the first rank's, on all
        ballot.conclude(verdict.data)
    elif verdict.missing:
        rank = verdict.missing[0]
        ballot.refuse(_left(ballot.which, rank, dict(verdict.refusals)[rank]), verdict.missing)
    else:
        ballot.refuse(verdict.reason, tuple(rank for rank, _ in verdict.refusals))


def _out_of_step(which: str, group: Group, own: dict[str, Any], verdict: Verdict) -> Reason | None:
    """Return the reason if a rank left the forward where others went on, or perhaps did: its vote is missing."""
    of_ranks = list(verdict.data)
    of_ranks[group.rank] = own
    known = {rank: data for rank, data in enumerate(of_ranks) if data is not None}
    raised = {rank: data["raised"] for rank, data in known.items() if data["raised"]}
    if not verdict.missing and (not raised or len({data["reached"] for data in known.values()}) == 1):
        return None
    if raised:
        rank = min(raised, key=lambda rank: (known[rank]["reached"], rank))
        return _left(which, rank, Reason.from_dict(raised[rank]))
    rank = verdict.missing[0]
    return _left(which, rank, dict(verdict.refusals)[rank])


def _left(which: str, rank: int, why: Reason) -> Reason:
    return because("out_of_step", which=which, rank=rank, why=str(why))
