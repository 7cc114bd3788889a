"""Proving the Sites of a model and settling the outcome: all of them on, or none, on all ranks."""

from __future__ import annotations

import contextlib
import logging
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fd_fusion.comm.group import Group, Verdict, Vote, agree
from fd_fusion.config import FusionConfig
from fd_fusion.integration.evidence import Contract
from fd_fusion.integration.forwards import AGAIN, STOCK, ExampleOf, Forwards, on_copies
from fd_fusion.integration.opening import Opening
from fd_fusion.integration.pairs import Pair
from fd_fusion.integration.proof import Proof, vacuous
from fd_fusion.integration.qk import Kernel, QKNorm
from fd_fusion.integration.report import Report
from fd_fusion.layers.finish_op import is_eager
from fd_fusion.reasons import BindError, Reason, because
from fd_fusion.site import Rejected, Site

logger = logging.getLogger("fd_fusion")


@dataclass
class Bound:
    """What a bound model holds, and what must be undone."""

    report: Report
    groups: list[Group] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    sites: list[tuple[Pair, Site]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)  # of the Sites
    qk_norms: list[QKNorm] = field(default_factory=list)
    undo_qk: list[Callable[[], None]] = field(default_factory=list)


def refuse(report: Report, pairs: list[Pair], reason: Reason, ranks: tuple[int, ...], config: FusionConfig) -> None:
    """Leave the pairs stock; an error instead if the user insisted. All ranks come here with the same verdict."""
    report.rejected += [Rejected(pair.name, reason, ranks) for pair in pairs]
    if reason.code != "never_wins" and (config.strict or config.backend != "auto"):  # a rule is no failure
        raise BindError(reason)


def attach_and_prove(
    model: Any, state: Bound, example: Callable[[], Any] | None, example_of: ExampleOf | None
) -> None:
    """Run the proving pass here, or leave it to the first forward; what is proven is installed."""
    if not state.sites:
        state.undo_qk += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
    elif example is None or not prove(model, state, example):
        _prove_in_first_forward(model, state, example_of or on_copies)


def prove(model: Any, state: Bound, example: Callable[[], Any], *, first_forward: bool = False) -> bool:
    """Collective. Up to three forwards, and a vote after each, on whatever it raised or showed on any rank.

    Returns False where nothing was shown, since there was nothing to sum: all stays stock, to be tried again. So it
    does where the stock forward itself raises in the place of the model's `first_forward`: that is the caller's.
    """
    proof = Proof([_subject(state, pair, site) for pair, site in state.sites])
    forwards = Forwards(state.sites, proof, example, dict(model.named_sublayers(include_self=True)))
    ballot = Ballot(forwards.run(STOCK))
    if first_forward and ballot.refusal is not None and ballot.refusal.code == "forward_raised":
        ballot = Ballot(again=ballot.refusal)
    _vote(state, ballot)
    if ballot.goes_on:
        ballot = Ballot(forwards.prove(state.qk_norms))
        ballot.again = because("no_rows_yet") if ballot.goes_on and forwards.nothing_computed else None
        ballot.differs = ballot.goes_on and forwards.difference is not None
        _vote(state, ballot, proof)
    if ballot.goes_on and ballot.differs:
        ballot = Ballot(forwards.run(AGAIN))
        if ballot.refusal is None:
            ballot.refusal, repeats = forwards.judge_spread()
            state.report.spread = None if repeats else because("stock_differs")
        _vote(state, ballot)
    if ballot.refusal is None and ballot.again is not None:
        _wait(state.report, ballot.again)
        return False
    _settle(state, ballot.refusal, ballot.ranks)
    return True


def _subject(state: Bound, pair: Pair, site: Site) -> tuple[Site, Contract, Callable[[], Any], int]:
    """What the proof has to know of a Site: what its kernel promises, its weight, and this rank's number."""
    (opened,) = (line.opening.opened for line in state.report.sites if line.site is site)
    in_order = getattr(opened, "in_rank_order", False)
    contract = Contract(pair.name, pair.group.size, pair.dtype, pair.eps, pair.weight_offset, in_order)
    return site, contract, pair.weight, pair.group.rank


def _wait(report: Report, reason: Reason) -> None:
    """Not proven, and no failure: said once."""
    if report.waiting is None:
        logger.warning("fd_fusion: %s; %s", reason, reason.remedy)
    report.waiting = reason


def _prove_in_first_forward(model: Any, state: Bound, example_of: ExampleOf) -> None:
    """The proving pass comes before the first eager forward, with its arguments; until then the model is stock.

    The forward that the caller asked for runs after the pass, once and on the caller's own arguments: bound if the
    pass proved it, else stock. So a miss is never an error of a request, and its output is right either way.
    """
    armed, stock, own, this = [True], model.forward, model.__dict__.get("forward"), weakref.ref(model)

    def prove_now(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            if prove(this(), state, example_of(stock, args, kwargs), first_forward=True):
                disarm()
        except BaseException:  # an error that the user asked for, or no vote any more: not half bound
            undo_all(state)
            raise
        state.report.log(logger)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not this():  # a copy of the model: it has no Site
            return type(self).forward(self, *args, **kwargs)
        if armed[0] and is_eager():
            prove_now(args, kwargs)
        return stock(*args, **kwargs)

    def disarm() -> None:
        was_armed, here, armed[0] = armed[0], this(), False
        if was_armed and here is not None and getattr(here.__dict__.get("forward"), "__func__", None) is code():
            del here.__dict__["forward"]
            if own is not None:
                here.__dict__["forward"] = own

    # Nothing that the state holds may keep the model alive.
    forward.__wrapped__, forward.binds_at_first_call, code = stock, True, weakref.ref(forward)
    model.__dict__["forward"] = types.MethodType(forward, model)
    state.undo.append(disarm)


@dataclass
class Ballot:
    """What the ranks come to: a refusal of some; or that nothing was shown; or that some rank's outputs differ."""

    refusal: Reason | None = None
    ranks: tuple[int, ...] = ()
    again: Reason | None = None
    differs: bool = False

    @property
    def goes_on(self) -> bool:
        return self.refusal is None and self.again is None

    def hear(self, ranks: Sequence[dict[str, Any]], proof: Proof | None) -> None:
        """The data of all ranks of a group, none of which refused: the same conclusions on each of them."""
        self.differs = self.differs or any(data["differs"] for data in ranks)
        for data in ranks:
            self.again = self.again or (data["again"] and Reason.from_dict(data["again"]))
        words = [data["words"] for data in ranks]
        if proof is not None and all(words) and self.again is None:
            self.refusal = proof.joint_refusal(words)
            self.again = None if self.refusal else vacuous(words)


def _vote(state: Bound, ballot: Ballot, proof: Proof | None = None) -> None:
    """Make the ballot one outcome for all ranks of all groups of the model.

    A refusal has to reach the ranks that share no group with its rank, so there are as many rounds as groups. The
    words of the proof are the group's own, and go through the first round alone.
    """
    for turn in range(len(state.groups)):
        for group in state.groups:
            names = [pair.name for pair, _ in state.sites if pair.group == group]
            shown = proof.words if proof is not None and ballot.goes_on and not turn else {}
            data = {
                "words": {name: shown[name] for name in names if name in shown} or None,
                "again": ballot.again and ballot.again.to_dict(),
                "differs": ballot.differs,
            }
            verdict = agree(group, "proof", Vote(ballot.refusal, data), timeout_s=state.report.config.timeout_s)
            if verdict.ok:
                ballot.hear(verdict.data, None if turn else proof)
            else:
                ballot.refusal = _one_report(verdict, group.size)
                ballot.ranks = tuple(rank for rank, _ in verdict.refusals)


def _one_report(verdict: Verdict, size: int) -> Reason:
    """The same on every rank, on the one that refused too: the reason that all of them gave, or the first rank's."""
    first = verdict.refusals[0][1]
    of_all = len(verdict.refusals) == size and all(why == first for _, why in verdict.refusals)
    return first if of_all else verdict.reason


def _settle(state: Bound, refusal: Reason | None, ranks: tuple[int, ...]) -> None:
    """Install all Sites and kernels, or take all of them away: a model is never half bound."""
    report = state.report
    report.waiting = None
    for _, site in state.sites:
        site.end_proof(refusal is None)
    if refusal is None:
        state.undo += [pair.attach(site) for pair, site in state.sites]
        state.undo_qk += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
        return
    undo_all(state)
    report.qk_stock.update(dict.fromkeys(report.qk_fused, refusal))  # they took part in what the pass showed
    report.qk_fused = []
    report.sites.clear()
    refuse(report, [pair for pair, _ in state.sites], refusal, ranks, report.config)


def undo_all(state: Bound) -> None:
    """Restore every instance and close every workspace."""
    while state.undo_qk:
        state.undo_qk.pop()()
    _undo_sites(state)


def _undo_sites(state: Bound) -> None:
    while state.undo:
        state.undo.pop()()
    while state.openings:
        with contextlib.suppress(Exception):  # a workspace that cannot be closed in time is left to process exit
            state.openings.pop().opened.close()
