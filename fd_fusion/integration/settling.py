"""Proving the Sites of a model and settling the outcome: all of them on, or none, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle

from fd_fusion import runtime
from fd_fusion.comm.group import Group, Vote, agree
from fd_fusion.config import FusionConfig
from fd_fusion.integration import lifecycle
from fd_fusion.integration.opening import Opening
from fd_fusion.integration.pairs import Pair
from fd_fusion.integration.proof import Proof, joint_refusal, outputs_refusal
from fd_fusion.integration.qk import Kernel, QKNorm
from fd_fusion.integration.report import Report
from fd_fusion.reasons import BindError, Reason, because
from fd_fusion.site import Forwards, Rejected, Site

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
    forwards: Forwards = field(default_factory=Forwards)
    freezes_itself: bool = False  # no host does it after its graphs were captured


def refuse(report: Report, pairs: list[Pair], reason: Reason, ranks: tuple[int, ...], config: FusionConfig) -> None:
    """Leave the pairs stock; an error instead if the user insisted. All ranks come here with the same verdict."""
    report.rejected += [Rejected(pair.name, reason, ranks) for pair in pairs]
    if reason.code != "never_wins" and (config.strict or config.backend != "auto"):  # a rule is no failure
        raise BindError(reason)


def attach_and_prove(model: Any, state: Bound, example: Callable[[], Sequence[Any]] | None) -> None:
    """Install the kernels and Sites, and run the proving pass here or leave it to the first forward."""
    example = example and paddle.no_grad()(example)  # nobody differentiates it, and a Site refuses gradients
    stock = list(example()) if example and state.sites else []
    state.undo_qk += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
    if not state.sites:
        return
    sites = [site for _, site in state.sites]
    proof = Proof(sites, {pair.name: pair.group.size for pair, _ in state.sites})
    state.undo += [pair.attach(site) for pair, site in state.sites]
    state.undo.append(model.register_forward_pre_hook(state.forwards.start).remove)
    if example is None:
        _prove_first_forward(model, state, proof)
        return
    proof.start()
    try:
        refusal = outputs_refusal(example(), stock, len(sites))
    except Exception as error:  # voted on and reported: the ranks must not part ways here
        refusal = because("forward_raised", error=f"{type(error).__name__}: {error}")
    if _conclude(state, proof, refusal):
        _settle(state, *_vote(state, outputs_refusal(example(), stock, len(sites))))


def _prove_first_forward(model: Any, state: Bound, proof: Proof) -> None:
    """The first forward of the model is the proving pass; the hooks that see its start and end go with it."""

    def conclude(*_) -> None:
        for hook in hooks:
            hook.remove()
        try:
            _conclude(state, proof, None)
        except BaseException:  # an error that the user asked for, or no vote any more: not half bound
            undo_all(state)
            raise
        state.report.log(logger)

    hooks = [
        model.register_forward_pre_hook(lambda *_: proof.start()),
        model.register_forward_post_hook(conclude),
    ]
    state.undo += [hook.remove for hook in hooks]


def _conclude(state: Bound, proof: Proof, refusal: Reason | None) -> bool:
    """Vote on what the pass showed; the Sites are on after it, or gone. Returns whether they are on."""
    refusal = refusal or proof.own_refusal()
    return _settle(state, *_vote(state, refusal, proof))


def _vote(state: Bound, refusal: Reason | None, proof: Proof | None = None) -> tuple[Reason | None, tuple[int, ...]]:
    """One outcome for all ranks of all groups of the model: (reason, ranks), or (None, ()).

    A refusal has to reach the ranks that share no group with its rank, so there are as many rounds as groups.
    """
    config, ranks = state.report.config, ()
    for _ in state.groups:
        for group in state.groups:
            pairs = [pair for pair, _ in state.sites if pair.group == group]
            samples = {pair.name: proof.samples[pair.name] for pair in pairs} if proof and not refusal else None
            verdict = agree(group, "proof", Vote(refusal, samples), timeout_s=config.timeout_s)
            if not verdict.ok:
                refusal, ranks = refusal or verdict.reason, tuple(rank for rank, _ in verdict.refusals)
            elif samples is not None:
                refusal = joint_refusal({pair.name: pair.dtype for pair in pairs}, verdict.data)
    return refusal, ranks


def _settle(state: Bound, refusal: Reason | None, ranks: tuple[int, ...]) -> bool:
    """Switch all Sites on, or take all of them away: a model is never half bound."""
    for _, site in state.sites:
        site.end_proof(refusal is None)
    if refusal is None:
        if state.freezes_itself:
            state.forwards.at_second(lambda: _freeze(state))
        return True
    report = state.report
    undo_all(state)  # the norms of q and k too: they took part in what the pass showed
    report.qk_stock.update(dict.fromkeys(report.qk_fused, refusal))
    report.qk_fused = []
    report.sites.clear()
    refuse(report, [pair for pair, _ in state.sites], refusal, ranks, report.config)
    return False


def _freeze(state: Bound) -> bool:
    """Freeze, unless a graph is being captured: the limit is a word in device memory. Returns whether it was done.

    By now a whole forward has run fused on this rank, so that nothing is left to compile. Ranks may come here in
    different forwards: the limit is each rank's own, and until it freezes a rank only waits longer.
    """
    if runtime.is_capturing():
        return False
    for opening in state.openings:
        opening.opened.freeze()
    return True


def undo_all(state: Bound) -> None:
    """Restore every instance and close every workspace."""
    while state.undo_qk:
        state.undo_qk.pop()()
    _undo_sites(state)


def _undo_sites(state: Bound) -> None:
    while state.undo:
        state.undo.pop()()
    for _, site in state.sites:  # a graph that was traced while the model was bound still calls it
        site.close()
    while state.openings:
        lifecycle.close(state.openings.pop().opened)
