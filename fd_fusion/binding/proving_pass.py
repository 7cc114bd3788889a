"""Proving the Sites of a model and settling the outcome: all of them on, or none, on all ranks."""

from __future__ import annotations

import inspect
import logging
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fd_fusion.binding import lifecycle
from fd_fusion.binding.backend_selection import SelectedBackend
from fd_fusion.binding.ballot import Ballot, vote
from fd_fusion.binding.evidence import Contract
from fd_fusion.binding.forwards import AGAIN, STOCK, ExampleOf, Forwards, on_copies
from fd_fusion.binding.pairs import Pair, holders
from fd_fusion.binding.proof import Proof
from fd_fusion.binding.qk_norms import Kernel, QKNorm
from fd_fusion.binding.report import Report
from fd_fusion.comm.circle import Known, circle_of, meet
from fd_fusion.comm.group import Group, Vote, agree
from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_runtime
from fd_fusion.frameworks.paddle_ops import is_eager
from fd_fusion.reasons import BindError, FusionError, Reason, because
from fd_fusion.site import ForwardCount, Rejected, Site

logger = logging.getLogger("fd_fusion")
NOTHING_SHOWN = ("zeros", "no_rows_yet", "no_outputs", "not_finite")
_TRIES = 3  # first forwards that may raise, or find a rank missing before they begin
_STRICT_TRIES = 4  # passes that may show nothing under `strict`


@dataclass(eq=False)
class Bound:
    """What a bound model holds, and what must be undone."""

    report: Report
    groups: list[Group] = field(default_factory=list)
    selected: list[SelectedBackend] = field(default_factory=list)
    sites: list[tuple[Pair, Site]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)  # of the Sites
    qk_norms: list[QKNorm] = field(default_factory=list)
    undo_qk: list[Callable[[], None]] = field(default_factory=list)
    labels: dict[Group, str] = field(default_factory=dict)  # what each group meets for
    known: Known = field(default_factory=dict)  # which ranks are in which groups
    live: list[Group] = field(default_factory=list)  # groups that still vote
    broken: Reason | None = None  # why this rank does not know all of its circle
    circle: Group | None = None  # all ranks that must come to one outcome
    failures: list[Reason] = field(default_factory=list)  # what was tried and did not work
    tries: int = 0  # first forwards in which no pass could run
    in_vain: int = 0  # passes that showed nothing
    since: int = 0  # eager forwards since the first of them
    on: bool = True  # somewhere in the circle; a bind that failed may be tried again
    forwards: ForwardCount = field(default_factory=ForwardCount)
    freezes_itself: bool = False  # no host does it after its graphs were captured

    @property
    def reaches_layers(self) -> bool:
        return bool(self.sites or self.undo or self.qk_norms or self.undo_qk)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None in a copy of the model, which is not bound."""
        return type(None), ()


def refuse(report: Report, pairs: list[Pair], reason: Reason, ranks: tuple[int, ...], config: FusionConfig) -> None:
    """Leave the pairs stock; an error instead if the user insisted. All ranks come here with the same verdict."""
    leave_stock(report, pairs, reason, ranks)
    if not reason.root.is_rule and config.insists:
        raise BindError(reason)


def leave_stock(report: Report, pairs: list[Pair], reason: Reason, ranks: tuple[int, ...]) -> None:
    report.rejected += [Rejected(pair.name, reason, ranks) for pair in pairs]


def insisted_failure(state: Bound) -> Reason | None:
    """What is off on this rank though the user insists on it: the meaning of `strict` and of a named backend.

    A named backend must not fail where it is tried. Strict: nothing may be off, whatever the reason, but what a rule
    of the table of reasons leaves out.
    """
    config, report = state.report.config, state.report
    off = list(state.failures)
    if config.strict:
        off += [report.off, *(one.reason for one in report.rejected), *report.qk_stock.values()]
    elif config.backend == "auto":
        return None
    return next((reason for reason in off if reason is not None and not reason.root.is_rule), None)


def attach_and_prove(
    model: Any, state: Bound, example: Callable[[], Any] | None, example_of: ExampleOf | None
) -> None:
    """Run the proving pass here, or leave it to the first forward; what is proven is installed."""
    if not state.sites:
        state.undo_qk += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
        return
    state.undo.append(model.register_forward_pre_hook(state.forwards.start).remove)
    for layer in holders(model, [pair for pair, _ in state.sites]):
        state.undo.append(layer.register_forward_pre_hook(state.forwards.start_inside).remove)
    if example is None or not prove(model, state, example):
        _prove_in_first_forward(model, state, example_of or on_copies)


def prove(model: Any, state: Bound, example: Callable[[], Any], *, first_forward: bool = False) -> bool:
    """Collective. Up to three forwards, and a vote after each, on whatever it raised or showed on any rank.

    Returns False where nothing was shown, since there was nothing to sum: all stays stock, to be tried again. So it
    does where the stock forward itself raises in the place of the model's `first_forward`: that is the caller's.
    """
    if first_forward and (reason := meet_again(state)) is not None:
        return _try_again(state, reason)
    proof = Proof([_subject(state, pair, site) for pair, site in state.sites])
    forwards = Forwards(state.sites, proof, example, dict(model.named_sublayers(include_self=True)))
    ballot = _ballot(forwards, forwards.run(STOCK))
    if first_forward and ballot.refusal is not None and ballot.refusal.code == "forward_raised":
        ballot.refusal, ballot.again = None, ballot.refusal
    _vote(state, ballot, forwards, is_callers=first_forward)
    if ballot.goes_on:
        ballot = _ballot(forwards, forwards.prove(state.qk_norms))
        if ballot.goes_on:
            ballot.refusal, ballot.again, ballot.differs = forwards.compare()
        _vote(state, ballot, forwards, proof)
    if ballot.refusal is None and ballot.differs:  # also where a site showed nothing: what is spoilt makes NaN there
        again = ballot.again
        ballot = _ballot(forwards, forwards.run(AGAIN))
        ballot.again = again
        if ballot.refusal is None:
            ballot.refusal, repeats = forwards.judge_spread()
            state.report.spread = None if repeats else because("stock_differs")
        _vote(state, ballot, forwards)
    if ballot.refusal is None and ballot.again is not None:
        return _try_again(state, ballot.again)
    _switch_on_or_undo(state, ballot.refusal, ballot.ranks)
    return True


def _ballot(forwards: Forwards, refusal: Reason | None) -> Ballot:
    """Of the forward that has just run."""
    return Ballot(refusal, which=forwards.which, raised=forwards.told, seen=forwards.seen)


def _vote(
    state: Bound, ballot: Ballot, forwards: Forwards, proof: Proof | None = None, *, is_callers: bool = False
) -> None:
    """Collective. Raises: FusionError: the ranks are out of step; in the caller's forward this rank's own error."""
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
    """What the proof has to know of a Site: what its kernel promises, its weight, and this rank's number."""
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
    """No outcome yet, but for a third time of no pass at all, or under `strict` a fourth pass that showed nothing.

    Returns: whether this is the end of it.
    """
    nothing_shown = reason.root.code in NOTHING_SHOWN
    state.in_vain += nothing_shown
    state.tries += not nothing_shown
    is_too_late = state.report.config.strict and state.in_vain >= _STRICT_TRIES and reason.root.code != "no_rows_yet"
    if state.tries < _TRIES and not is_too_late:
        _wait(state.report, reason)
        return False
    _switch_on_or_undo(state, reason, ())
    return True


def _is_turn(state: Bound) -> bool:
    """Whether this eager forward is tried: after one that showed nothing the 1st, 2nd, 4th, 8th ... is.

    A pass costs two forwards, and a layer may be zero for good. All ranks count the same forwards.
    """
    waiting = state.report.waiting
    if waiting is None or waiting.root.code not in NOTHING_SHOWN:
        return True
    state.since += 1
    return state.since & (state.since - 1) == 0


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
        except BaseException as error:  # an error that the user asked for, or no vote any more: not half bound
            give_up(state, error)
            if state.report.off.root.code == "out_of_step":
                state.undo.append(_stop(this(), own, state.report.off))
            raise
        state.report.log(logger)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_eager() and own is None:  # nothing that would break the graph, a copy's neither
            return type(self).forward(self, *args, **kwargs)
        if self is not this():  # a copy of the model: it has no Site
            return type(self).forward(self, *args, **kwargs)
        if armed[0] and is_eager() and _is_turn(state):
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
    forward.__signature__ = _with_self(stock)
    model.__dict__["forward"] = types.MethodType(forward, model)
    state.undo.append(disarm)


def _with_self(stock: Callable[..., Any]) -> inspect.Signature:
    """That of the function behind a model's forward: to_static reads the names of a call's arguments off it."""
    signature = inspect.signature(stock)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[own, *signature.parameters.values()])


def _switch_on_or_undo(state: Bound, refusal: Reason | None, ranks: tuple[int, ...]) -> None:
    """Install all Sites and kernels, or take all of them away: a model is never half bound."""
    report = state.report
    report.waiting = None
    for _, site in state.sites:
        site.end_proof(refusal is None)
    if refusal is None:
        state.undo += [pair.stock.attach(site) for pair, site in state.sites]
        state.undo_qk += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
        if state.freezes_itself:
            state.forwards.at_second(lambda: _freeze(state))
        return
    state.on = False
    undo_all(state)
    report.qk_stock.update(dict.fromkeys(report.qk_fused, refusal))  # they took part in what the pass showed
    report.qk_fused = []
    report.sites.clear()
    pairs = [pair for pair, _ in state.sites]
    state.sites, state.qk_norms = [], []  # nothing of the model is held any more
    refuse(report, pairs, refusal, ranks, report.config)


def _freeze(state: Bound) -> bool:
    """Freeze, unless a graph is being captured: the limit is a word in device memory. Returns whether it was done.

    By now a whole forward has run fused on this rank, so that nothing is left to compile. Ranks may come here in
    different forwards: the limit is each rank's own, and until it freezes a rank only waits longer.
    """
    if paddle_runtime.is_capturing():
        return False
    for selected in state.selected:
        selected.op.freeze()
    return True


def _stop(model: Any, own: Any, reason: Reason) -> Callable[[], None]:
    """No forward of the model any more, until it is unbound: its sums would be wrong. Returns the undo."""

    def forward(*_: Any, **__: Any) -> NoReturn:
        raise FusionError(reason)

    def undo() -> None:
        if (here := this()) is not None and here.__dict__.get("forward") is forward:
            del here.__dict__["forward"]
            if own is not None:
                here.__dict__["forward"] = own

    this = weakref.ref(model)
    model.__dict__["forward"] = forward
    return undo


def give_up(state: Bound, error: BaseException) -> None:
    """What bind, or the pass in the first forward, raises: nothing stays bound, and the next bind tries anew."""
    told = because("bind_raised", error=f"{type(error).__name__}: {error}")
    error = error if isinstance(error, FusionError) else error.__cause__  # of the caller's own, when out of step
    state.on, state.report.waiting = False, None
    state.report.off = error.reason if isinstance(error, FusionError) else told
    state.report.sites.clear()
    state.report.qk_fused.clear()
    try:
        undo_all(state)
    except Exception:  # told, and not raised: what the caller is to hear is the first error
        logger.exception("fd_fusion: not all of the model could be restored")


def undo_all(state: Bound) -> None:
    """Restore every instance, close every workspace. Goes on after what raises, and raises the first error then."""
    errors: list[Exception] = []

    def attempt(undo: Callable[[], None]) -> None:
        try:
            undo()
        except Exception as error:  # raised below: half of an undo is worse than none
            errors.append(error)

    for undos in (state.undo_qk, state.undo):
        while undos:
            attempt(undos.pop())
    for _, site in state.sites:  # a graph that was traced while the model was bound still calls it
        site.close()
    while state.selected:
        lifecycle.close(state.selected.pop().op)
    if errors:
        raise errors[0]
