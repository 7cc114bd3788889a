"""The votes of the proving pass: what each rank found in a forward becomes one outcome on all of them.

A forward of the pass holds the host's own collectives, which pair by their order alone. A rank that leaves one in the
middle while the others go on is out of step with them for good: its next all-reduce would be paired with one of
theirs that is long past, and every sum would be wrong without a word. So each rank votes how far it came.
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
    """What the ranks come to: a refusal of some; or that nothing was shown; or that some rank's outputs differ.

    which, raised, seen: the forward, what it raised on this rank, and the pairs through whose norms it came.
    """

    refusal: Reason | None = None
    ranks: tuple[int, ...] = ()
    again: Reason | None = None
    differs: bool = False
    which: str = ""
    raised: Reason | None = None
    seen: Collection[str] = ()

    @property
    def goes_on(self) -> bool:
        return self.refusal is None and self.again is None

    @property
    def is_out_of_step(self) -> bool:
        return self.refusal is not None and self.refusal.root.code == "out_of_step"

    def finds(self) -> dict[str, Any]:
        """What this rank states beside a refusal."""
        return {"again": self.again and self.again.to_dict(), "differs": self.differs}

    def refuse(self, reason: Reason, ranks: tuple[int, ...]) -> None:
        self.refusal, self.ranks = reason, ranks

    def hear(self, ranks: Sequence[dict[str, Any]], proof: Proof | None = None) -> None:
        """The data of all ranks of a group, none of which refused: the same conclusions on each of them."""
        self.differs = self.differs or any(data["differs"] for data in ranks)
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
        data = {"words": {name: shown[name] for name in own if name in shown} or None, **ballot.finds()}
        data["raised"] = ballot.raised and ballot.raised.to_dict()
        data["reached"] = len(set(own) & set(ballot.seen))
        verdict = agree(group, "proof", Vote(ballot.refusal, data), timeout_s=timeout_s)
        if ballot.is_out_of_step:
            continue
        if reason := _out_of_step(ballot.which, group, data, verdict):
            ballot.refuse(reason, verdict.missing)
        elif verdict.ok:  # a rank that refuses says so once more, to the whole circle
            ballot.hear(verdict.data, proof)
    verdict = agree(circle, "outcome", Vote(ballot.refusal, ballot.finds()), timeout_s=timeout_s)
    if ballot.is_out_of_step:
        return
    if verdict.ok:
        ballot.again = None  # from here on the first rank's, on all
        ballot.hear(verdict.data)
    elif verdict.missing:
        rank = verdict.missing[0]
        ballot.refuse(_left(ballot.which, rank, dict(verdict.refusals)[rank]), verdict.missing)
    else:
        ballot.refuse(verdict.reason, tuple(rank for rank, _ in verdict.refusals))


def _out_of_step(which: str, group: Group, own: dict[str, Any], verdict: Verdict) -> Reason | None:
    """Whether a rank left the forward where another went on; or perhaps did, since its vote is missing."""
    heard = list(verdict.data)
    heard[group.rank] = own
    heard = {rank: data for rank, data in enumerate(heard) if data is not None}
    raised = {rank: data["raised"] for rank, data in heard.items() if data["raised"]}
    if not verdict.missing and (not raised or len({data["reached"] for data in heard.values()}) == 1):
        return None
    if raised:
        rank = min(raised, key=lambda rank: (heard[rank]["reached"], rank))
        return _left(which, rank, Reason.from_dict(raised[rank]))
    rank = verdict.missing[0]
    return _left(which, rank, dict(verdict.refusals)[rank])


def _left(which: str, rank: int, why: Reason) -> Reason:
    return because("out_of_step", which=which, rank=rank, why=str(why))
