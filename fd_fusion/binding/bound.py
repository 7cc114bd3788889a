"""Which models are bound, what each of them holds, what is an error of bind, and how all of it is undone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fd_fusion.binding import lifecycle
from fd_fusion.binding.backend_selection import SelectedBackend
from fd_fusion.binding.pairs import Pair
from fd_fusion.binding.qk_norms import QKNorm
from fd_fusion.binding.report import Report
from fd_fusion.comm.circle import Known
from fd_fusion.comm.group import Group
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.site import ForwardCount, Rejected, Site

logger = logging.getLogger("fd_fusion")
_ATTRIBUTE = "_fd_fusion_state"  # of a model: its Bound


@dataclass(eq=False)
class Bound:
    """What a bound model holds, and what must be undone."""

    report: Report
    groups: list[Group] = field(default_factory=list)
    selected: list[SelectedBackend] = field(default_factory=list)
    sites: list[tuple[Pair, Site]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    qk_norms: list[QKNorm] = field(default_factory=list)
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
        return bool(self.sites or self.undo or self.qk_norms)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Give None to a copy of the model, which is not bound."""
        return type(None), ()


class Book:
    """model -> its state. A model keeps a state that reaches its layers, the book any other one.

    A layer may hold its model: a book that kept such a state would keep the model for ever, even under a weak key. A
    state that its model keeps is a cycle, which the garbage collector takes whole.
    """

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Any, Callable[[], Bound | None]] = weakref.WeakKeyDictionary()

    def __setitem__(self, model: Any, state: Bound) -> None:
        if state.reaches_layers:
            model.__dict__[_ATTRIBUTE] = state
        self._states[model] = weakref.ref(state) if state.reaches_layers else lambda: state

    def get(self, model: Any) -> Bound | None:
        return self._states.get(model, lambda: None)()

    def pop(self, model: Any) -> Bound | None:
        state = self.get(model)
        if self._states.pop(model, None) is not None:
            model.__dict__.pop(_ATTRIBUTE, None)
        return state

    def values(self) -> list[Bound]:
        return [state for found in list(self._states.values()) if (state := found()) is not None]


def leave_stock(state: Bound, pairs: list[Pair], reason: Reason, ranks: tuple[int, ...]) -> None:
    state.report.rejected += [Rejected(pair.name, reason, ranks) for pair in pairs]
    state.failures.append(reason)


def leave_all_stock(state: Bound, reason: Reason, ranks: tuple[int, ...]) -> None:
    """Take all Sites away again, as every other rank does: a model is never half bound."""
    undo_all(state)
    state.on = False
    state.report.sites.clear()
    leave_stock(state, [pair for pair, _ in state.sites], reason, ranks)
    state.sites, state.groups = [], []  # nothing of the model is held any more


def insisted_failure(state: Bound) -> Reason | None:
    """Return what is off on this rank though `strict` or a named backend insists on it.

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


def give_up(state: Bound, error: BaseException) -> None:
    """Undo the bind that raised `error`: nothing stays bound, and the next bind tries anew."""
    raised = because("bind_raised", error=f"{type(error).__name__}: {error}")
    error = error if isinstance(error, FusionError) else error.__cause__  # of the caller's own, when out of step
    state.on, state.report.waiting = False, None
    state.report.off = error.reason if isinstance(error, FusionError) else raised
    state.report.sites.clear()
    state.report.qk_fused.clear()
    try:
        undo_all(state)
    except Exception:  # logged, and not raised: the caller gets the first error
        logger.exception("fd_fusion: not all of the model could be restored")


def undo_all(state: Bound) -> None:
    """Restore every instance, close every workspace. Goes on after what raises, and raises the first error then."""
    errors: list[Exception] = []
    while state.undo:  # the last first
        try:
            state.undo.pop()()
        except Exception as error:  # raised below: half of an undo is worse than none
            errors.append(error)
    for _, site in state.sites:  # a graph that was traced while the model was bound still calls it
        site.close()
    while state.selected:
        lifecycle.close(state.selected.pop().op)
    if errors:
        raise errors[0]
