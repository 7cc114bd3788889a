"""The opening of a model's backends, group by group: which ranks take part, whether all built alike, the outcome."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from fd_fusion import __version__
from fd_fusion.binding import lifecycle
from fd_fusion.binding.backend_selection import select_backend
from fd_fusion.binding.bound import Bound, insisted_failure, leave_stock, undo_all
from fd_fusion.binding.pairs import Pair
from fd_fusion.binding.report import Report
from fd_fusion.comm.circle import circle_of, in_order, meet
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_ops, paddle_runtime
from fd_fusion.reasons import BindError, Reason, because
from fd_fusion.site import Rejected, Site

_models: dict[str, list[tuple[int, weakref.ref]]] = {}  # by what their ranks compare: (number, model)


def by_group(pairs: list[Pair], also: Group | None) -> dict[Group, list[Pair]]:
    """Sort the pairs by their groups of several ranks. `also`: a group that is there in any case."""
    found: dict[Group, list[Pair]] = {also: []} if also is not None and also.size > 1 else {}
    for pair in pairs:
        if pair.group.size > 1:
            found.setdefault(pair.group, []).append(pair)
    return found


def group_of_last_resort(report: Report, pairs: Sequence[Pair]) -> Group | None:
    """Return the group that votes on a failure of q and k norms in a model without pairs, if the user insists."""
    config = report.config
    tried = report.qk_fused or any(not reason.is_rule for reason in report.qk_stock.values())
    return paddle_ops.group_of() if tried and config.insists and not pairs else None


def label_of(model: Any, pairs: list[Pair], config: FusionConfig, deterministic: bool) -> tuple[str, int]:
    """Return (what must be equal on all ranks of a group, the number of this model among its equals).

    A rank that is late for one model must not bind it together with the next one of the others.
    """
    spec = ("name", "hidden_size", "dtype", "weight_dtype", "weight_offset", "eps", "fp8")
    shape = [[getattr(value := getattr(pair, fact), "code", value) for fact in spec] for pair in pairs]  # of a Reason
    text = json.dumps([__version__, shape, config.to_dict(), deterministic], default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    alike = _models.setdefault(digest, [])
    number = next((number for number, known in alike if known() is model), None)
    if number is None:
        number = alike[-1][0] + 1 if alike else 0
        alike.append((number, weakref.ref(model)))
    return digest, number


def join(state: Bound, labels: Mapping[Group, str]) -> None:
    """Collective: meet in each group, whatever a rank has missed before, and learn which ranks belong together.

    Args: labels: what each group meets for, see `meeting`. Sets `live`, `known` and `broken`.
    """
    state.labels = dict(labels)
    state.known, state.broken, state.live = meet(labels, timeout_s=state.report.config.timeout_s)


def conclude_opening(state: Bound) -> None:
    """Collective: vote in the circle on what is open, and on what was insisted on in vain.

    Sets `circle` to the ranks that the open groups tie together.
    Raises: BindError: on every rank of the circle alike.
    """
    config, failure = state.report.config, insisted_failure(state)
    circle = None if state.broken is not None else circle_of(state.live, state.known)
    if circle is None:  # no other rank; or a rank that did not come, which every live group's vote has named
        state.on = state.broken is None and not state.failures
        if failure is None and config.insists:
            failure = state.broken
        if failure is not None:
            raise BindError(failure)
        return
    names = [group.name for group in state.groups]
    verdict = agree(circle, "bound", Vote(failure, names), timeout_s=config.timeout_s)
    if verdict.ok:
        opened = {name for data in verdict.data for name in data}
        state.circle = circle_of(state.groups, state.known, opened)
        state.on = bool(opened) or not state.failures
        return
    if not verdict.missing or config.insists:
        raise BindError(verdict.reason)
    _give_up(state, verdict.reason, verdict.missing)


def _give_up(state: Bound, reason: Reason, ranks: tuple[int, ...]) -> None:
    """Close what this rank opened, as every other does, when a rank went missing in between."""
    undo_all(state)
    state.on = False
    state.report.sites.clear()
    leave_stock(state.report, [pair for pair, _ in state.sites], reason, ranks)
    state.sites.clear()
    state.groups.clear()


def structure_refusal(
    group: Group,
    pairs: int,
    label: tuple[str, int],
    failure: Reason | None,
    room: tuple[int, int],
    config: FusionConfig,
) -> tuple[tuple[Reason, tuple[int, ...]] | None, int]:
    """Collective: hold the first vote of a group. Returns None if every rank built the same, else (reason, ranks);
    and the bytes that each of its workspaces may have, so that all fit into what is left of `workspace_mb` on every
    rank.

    Args: room: how many workspaces this rank needs, of all its groups, and the bytes that are left for them.
    """
    verdict = agree(group, "structure", Vote(failure, [*label, pairs, *room]), timeout_s=config.timeout_s)
    if not verdict.ok:
        return (verdict.reason, tuple(rank for rank, _ in verdict.refusals)), 0
    digests, numbers, counts, spaces, left = zip(*verdict.data)
    others = [rank for rank in range(group.size) if (digests[rank], numbers[rank]) != (digests[0], numbers[0])]
    if others:
        if len(set(digests)) == 1:  # from now on all ranks count alike again
            alike = _models[label[0]]
            alike[-1] = (max(numbers), alike[-1][1])
        detail = (
            f"its pairs, config or version are not those of rank 0 ({counts[others[0]]} pairs; rank 0: {counts[0]})"
        )
        return (because("structure_differs", rank=others[0], detail=detail), tuple(others)), 0
    return None, max(0, min(left)) // max(1, *spaces)


def open_sites(
    state: Bound,
    pairs: list[Pair],
    config: FusionConfig,
    deterministic: bool,
    failure: Reason | None,
    labels: Mapping[Group, tuple[str, int]],
) -> None:
    """Collective: give the pairs their Sites, group by group. `failure` of this rank is its refusal in each vote."""
    report, failure = state.report, failure or state.broken
    report.rejected += [Rejected(pair.name, because("one_rank")) for pair in pairs if pair.group.size == 1]
    pairs_of = {group: [pair for pair in pairs if pair.group == group] for group in labels}
    spaces = len({(group, pair.hidden_size, pair.dtype) for group in pairs_of for pair in pairs_of[group]})
    lifecycle.close_dropped([group for group in in_order(pairs_of) if group in state.live], config.timeout_s)
    room = spaces, (config.workspace_mb << 20) - lifecycle.taken_bytes()
    for group in in_order(pairs_of):
        if group not in state.live:  # a rank did not come
            refused, each = (state.broken, ()), 0
        else:
            refused, each = structure_refusal(group, len(pairs_of[group]), labels[group], failure, room, config)
        if refused is not None:
            _leave_stock(state, pairs_of[group], *refused)
        elif pairs_of[group]:
            _open_group(state, group, pairs_of[group], config, deterministic, each)


def _leave_stock(state: Bound, pairs: list[Pair], reason: Reason, ranks: tuple[int, ...]) -> None:
    """Leave the pairs of one group stock; the others go on, and the vote of `conclude_opening` is for all of them."""
    leave_stock(state.report, pairs, reason, ranks)
    state.failures.append(reason)


def _open_group(
    state: Bound, group: Group, pairs: list[Pair], config: FusionConfig, deterministic: bool, workspace_bytes: int
) -> None:
    """Collective: open one workspace for each hidden size and dtype of the group, and make a Site for each pair."""
    spaces: dict[tuple[int, str], list[Pair]] = {}
    for pair in pairs:
        spaces.setdefault((pair.hidden_size, pair.dtype), []).append(pair)
    for key in sorted(spaces):
        selected, reason, ranks = select_backend(group, spaces[key], config, deterministic, workspace_bytes)
        if selected is None:
            _leave_stock(state, spaces[key], reason, ranks)
            continue
        state.selected.append(selected)
        lifecycle.hold(group, selected.op)
        shared = {"caller": paddle_runtime.caller_function(), "forwards": state.forwards}
        for pair in spaces[key]:
            site = Site(pair.name, selected.op, pair.stock, hooks=pair.hooks, **shared)
            state.sites.append((pair, site))
            state.report.add_site(site, selected, group, pair.fp8)
    if any(pair.group == group for pair, _ in state.sites):
        state.groups.append(group)
