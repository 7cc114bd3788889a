"""`bind` and `unbind`: give a built model its Sites, on all ranks or on none, and prove them.

Knows no host: what a pair is, how its ends take a Site and how its stock path runs comes with each `Pair`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from fd_fusion.binding import lifecycle, metrics
from fd_fusion.binding.bound import Book, Bound, give_up, logger, undo_all
from fd_fusion.binding.first_forward import attach_and_prove
from fd_fusion.binding.forwards import ExampleOf
from fd_fusion.binding.opening import by_group, conclude_opening, group_of_last_resort, label_of, open_sites
from fd_fusion.binding.pairs import Pair, without_hooked
from fd_fusion.binding.qk_norms import QKNorm, choose_qk_norms
from fd_fusion.binding.report import Report
from fd_fusion.comm.circle import meet
from fd_fusion.comm.group import Group
from fd_fusion.config import Resolved
from fd_fusion.reasons import BindError, FusionTimeout, Reason, because
from fd_fusion.site import Rejected

_bound = Book()  # models that are off too


def bind(
    model: Any,
    pairs: Sequence[Pair | Rejected],
    qk_norms: Sequence[QKNorm],
    resolved: Resolved,
    *,
    example: Callable[[], Any] | None = None,
    example_of: ExampleOf | None = None,
    deterministic: bool = False,
    group: Group | None = None,
    refusal: Reason | None = None,
    freezes_itself: bool = False,
) -> Report:
    """Collective: give the pairs of `model` their Sites. `fd_fusion.bind` has the contract.

    Args:
        example_of: (forward, args, kwargs) -> example, in place of copies of the first forward's arguments.
        group: ranks that vote in any case, also for a model in which this rank finds no pair.
        refusal: why this rank cannot bind; the others read it in the vote.
        freezes_itself: no host calls `freeze` after its graphs were captured.
    """
    with lifecycle.lock:
        before = _bound.get(model)
    if before is not None:
        if before.report.config == resolved.config and before.on:
            return before.report
        unbind(model)
    state = _enter(model, Report(resolved.config, resolved.source, type(model).__name__, off=resolved.reason))
    report, state.freezes_itself = state.report, freezes_itself
    if resolved.config is None:
        return report
    found = without_hooked(pairs)
    report.rejected += [pair for pair in found if isinstance(pair, Rejected)]
    found = [pair for pair in found if isinstance(pair, Pair)]
    if refusal is not None:
        report.off = refusal
    elif not resolved.config.enable_all_reduce_rms_norm:
        report.off = because("disabled", flag="enable_all_reduce_rms_norm")
    elif not found and not report.rejected:
        report.off = because("no_pairs", model=type(model).__name__)
    try:
        failure = refusal or _choose_qk(state, qk_norms)
        state.failures += [failure] if failure is not None else []
        pairs_of = by_group(found, group or group_of_last_resort(report, found))
        labels = {one: label_of(model, of, resolved.config, deterministic) for one, of in pairs_of.items()}
        state.labels = {one: f"{digest}/{number}" for one, (digest, number) in labels.items()}
        state.known, state.broken, state.live = meet(state.labels, timeout_s=resolved.config.timeout_s)
        if resolved.config.enable_all_reduce_rms_norm:
            report.rejected += [Rejected(pair.name, because("one_rank")) for pair in found if pair.group.size == 1]
            open_sites(state, pairs_of, labels, failure, deterministic)
        conclude_opening(state)
        attach_and_prove(model, state, example, example_of)
    except BaseException as error:
        give_up(state, error)
        _enter(model, report)  # no layer is held any more
        raise
    with lifecycle.lock:
        _bound[model] = state  # its Sites reach the layers from now on, and a layer may know its model
    lifecycle.watch_model(model, [selected.op for selected in state.selected])
    report.log(logger)
    return report


def _enter(model: Any, report: Report) -> Bound:
    """Enter a model that is not bound, or not yet."""
    with lifecycle.lock:
        _bound[model] = state = Bound(report, on=False)
    return state


def unbind(model: Any) -> None:
    """Collective: restore every instance as it was and close the workspaces. Does nothing to an unbound model.

    A graph that was captured or traced while the model was bound uses them, and must not run again.
    """
    with lifecycle.lock:
        state = _bound.pop(model)
    if state is not None:
        undo_all(state)


def report() -> list[Report]:
    """Return the reports of the models of this process for which `bind` was called, those that are off too."""
    with lifecycle.lock:
        return [state.report for state in _bound.values()]


def note_off(model: Any, resolved: Resolved, reason: Reason) -> None:
    """Keep a report of a model that a host leaves stock without a vote, for a reason that all its ranks share.

    Raises: BindError: under `strict`, unless the reason is a rule.
    """
    with contextlib.suppress(TypeError):  # what is no layer, and cannot be held weakly, has no report
        _enter(model, Report(resolved.config, resolved.source, type(model).__name__, off=reason))
    if resolved.config is not None and resolved.config.strict and not reason.is_rule:
        raise BindError(reason)


def check() -> None:
    """Raise FusionTimeout if a fused call of any bound model ran out of time. For use before tokens are published.

    Nothing else is raised: it writes the metrics once a minute, and what goes wrong with them is one line in the log.
    """
    try:
        lifecycle.check()
    except FusionTimeout:
        metrics.tick(report, every_s=1.0)  # this process may end before the minute is over
        raise
    metrics.tick(report)


def error_pages() -> list[int]:
    """Return the descriptors of the pages on which fused kernels of this process write which rank is missing."""
    pages = [selected.op.error_page for state in _bound.values() for selected in state.selected]
    return [page for page in pages if page is not None]


def _choose_qk(state: Bound, norms: Sequence[QKNorm]) -> Reason | None:
    """Choose what the q and k norms run. Returns the failure that `strict` or a named backend makes an error."""
    config, report = state.report.config, state.report
    state.qk_norms, report.qk_stock = choose_qk_norms(norms, config)
    report.qk_fused = [norm.name for norm in state.qk_norms]
    failed = [why for why in report.qk_stock.values() if why.code in ("backend_failed", "qk_differs", "qk_wrote_v")]
    return failed[0] if config.insists and failed else None
