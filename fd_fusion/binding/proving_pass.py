"""The proving pass over the Sites of a model, and its outcome: all of them on, or none, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fd_fusion.binding.ballot import Ballot, vote
from fd_fusion.binding.bound import Bound, leave_all_stock, logger
from fd_fusion.binding.evidence import Contract
from fd_fusion.binding.forwards import Forwards
from fd_fusion.binding.pairs import Pair
from fd_fusion.binding.proof import Proof
from fd_fusion.binding.qk_norms import Kernel
from fd_fusion.comm.circle import circle_of, meet
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.frameworks import paddle_runtime
from fd_fusion.reasons import BindError, FusionError, Reason
from fd_fusion.site import Site

NOTHING_SHOWN = ("zeros", "no_rows_yet", "no_outputs", "not_finite")
_TRIES = 3  # first forwards that may raise, or find a rank missing before they begin
_STRICT_TRIES = 4  # passes that may show nothing under `strict`


def prove(model: Any, state: Bound, example: Callable[[], Any], *, first_forward: bool = False) -> bool:
    """Collective: run two or three forwards, and vote after each on what it raised or showed on any rank.

    Returns False where nothing was shown, since there was nothing to sum: all stays stock, to be tried again. So it
    does where the stock forward raises in the place of the model's `first_forward`: that error is the caller's.
    """
    if first_forward and (reason := meet_again(state)) is not None:
        return _try_again(state, reason)
    proof = Proof([_subject(state, pair, site) for pair, site in state.sites])
    forwards = Forwards(state.sites, proof, example, dict(model.named_sublayers(include_self=True)))
    ballot = forwards.stock()
    if first_forward and ballot.refusal is not None and ballot.refusal.code == "forward_raised":
        ballot.refusal, ballot.again = None, ballot.refusal
    _vote(state, ballot, forwards, is_callers=first_forward)
    if ballot.goes_on:
        ballot = forwards.proving(state.qk_norms)
        _vote(state, ballot, forwards, proof)
    if ballot.refusal is None and ballot.differs:  # also where a site showed nothing: what is spoilt makes NaN there
        again, ballot = ballot.again, forwards.again()
        ballot.again, state.report.spread = again, forwards.spread
        _vote(state, ballot, forwards)
    if ballot.refusal is None and ballot.again is not None:
        return _try_again(state, ballot.again)
    links: dict[str, Site] = {}
    if ballot.refusal is None and ballot.linked:  # whether two-shot may leave residuals: on all ranks, or none
        staying = forwards.staying(state.qk_norms)
        _vote(state, staying, forwards)
        state.report.residual = staying.refusal
        links = proof.links if staying.refusal is None else {}
    _switch_on_or_undo(state, ballot.refusal, ballot.ranks)
    for site in proof.sites:
        if site.name in links:
            site.leave_residual(links[site.name])
    state.report.staying = len(links)
    return True


def _vote(
    state: Bound, ballot: Ballot, forwards: Forwards, proof: Proof | None = None, *, is_callers: bool = False
) -> None:
    """Collective: vote. Raises FusionError out of step; in the caller's forward this rank's own error."""
    if not state.groups:
        return
    assert state.circle is not None, "a model with Sites has a circle, or no vote"
    names = {group: [pair.name for pair, _ in state.sites if pair.group == group] for group in state.groups}
    vote(ballot, names, state.circle, state.report.config.timeout_s, proof)
    if ballot.is_out_of_step:
        error = FusionError(ballot.refusal)
        if is_callers and ballot.again is not None and forwards.raised is not None:
            raise forwards.raised from error
        raise error from forwards.raised


def _subject(state: Bound, pair: Pair, site: Site) -> tuple[Site, Contract, Callable[[], Any], int]:
    """Return what the proof needs of a Site: what its kernel promises, its weight, and this rank's number."""
    (op,) = (line.selected.op for line in state.report.sites if line.site is site)
    contract = Contract(pair.name, pair.group.size, pair.dtype, *pair.stock.numbers(), op.in_rank_order)
    return site, contract, pair.stock.weight, pair.group.rank


def meet_again(state: Bound) -> Reason | None:
    """Collective: before a pass that comes some time after its bind. Ranks may have missed votes of other models.

    Returns: why no rank runs the forwards of the pass, or None.
    """
    timeout_s = state.report.config.timeout_s
    labels = {group: f"pass {state.labels.get(group)}" for group in state.groups}
    known, broken, live = meet(labels, timeout_s=timeout_s)
    if broken is None and live:
        state.circle = circle_of(live, known)
        broken = agree(state.circle, "pass", Vote(), timeout_s=timeout_s).reason
    return broken


def _try_again(state: Bound, reason: Reason) -> bool:
    """Leave the outcome open, but not a third time without a pass, nor under `strict` a fourth that showed nothing.

    Returns: whether this is the end of it.
    """
    nothing_shown = reason.root.code in NOTHING_SHOWN
    state.in_vain += nothing_shown
    state.tries += not nothing_shown
    is_too_late = state.report.config.strict and state.in_vain >= _STRICT_TRIES and reason.root.code != "no_rows_yet"
    if state.tries < _TRIES and not is_too_late:
        if state.report.waiting is None:
            logger.warning("fd_fusion: %s; %s", reason, reason.remedy)
        state.report.waiting = reason
        return False
    _switch_on_or_undo(state, reason, ())
    return True


def _switch_on_or_undo(state: Bound, refusal: Reason | None, ranks: tuple[int, ...]) -> None:
    """Install all Sites and kernels, or take all of them away: a model is never half bound."""
    report = state.report
    report.waiting = None
    for _, site in state.sites:
        site.end_proof(refusal is None)
    if refusal is None:
        state.undo += [pair.stock.attach(site) for pair, site in state.sites]
        state.undo += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
        if state.freezes_itself:
            state.forwards.at_second(lambda: _freeze(state))
        return
    report.qk_stock.update(dict.fromkeys(report.qk_fused, refusal))  # they took part in what the pass showed
    report.qk_fused, state.qk_norms = [], []
    leave_all_stock(state, refusal, ranks)
    if not refusal.root.is_rule and report.config.insists:
        raise BindError(refusal)


def _freeze(state: Bound) -> bool:
    """Freeze, unless a graph is being captured: the limit is a word in device memory. Returns whether it was done.

    By now a whole forward has run fused on this rank, so that nothing is left to compile. Ranks may freeze in
    different forwards: the limit is each rank's own, and until it freezes a rank only waits longer.
    """
    if paddle_runtime.is_capturing():
        return False
    for selected in state.selected:
        selected.op.freeze()
    return True
