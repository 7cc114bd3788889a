"""`bind` and `unbind`: give a built model its Sites, on all ranks or on none, and prove them.

Knows no host: what a pair is, how its ends take a Site and how its stock path runs comes with each `Pair`.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fd_fusion import __version__, runtime
from fd_fusion.comm.group import Group, Vote, agree
from fd_fusion.config import FusionConfig, Resolved, resolve
from fd_fusion.integration import metrics, native
from fd_fusion.integration.opening import Opening, open_for
from fd_fusion.integration.pairs import Pair
from fd_fusion.integration.qk import QKNorm, settle_qk_norms
from fd_fusion.integration.report import Report
from fd_fusion.integration.settling import Bound, attach_and_prove, logger, refuse, undo_all
from fd_fusion.reasons import BindError, FusionTimeout, Reason, because
from fd_fusion.site import Rejected, Site

_bound: weakref.WeakKeyDictionary[Any, Bound] = weakref.WeakKeyDictionary()


def bind(
    model: Any,
    config: FusionConfig | Mapping[str, Any] | str | None = None,
    *,
    pairs: Sequence[Pair | Rejected] | None = None,
    qk_norms: Sequence[QKNorm] | None = None,
    example: Callable[[], Sequence[Any]] | None = None,
    deterministic: bool = False,
    source: str = "an argument",
    resolved: Resolved | None = None,
) -> Report:
    """Collective: give the pairs of `model` their Sites. Every rank of every group calls it with the same arguments.

    Args:
        model: a built `paddle.nn.Layer`, its weights loaded.
        config: asks for fusion; without it the config that the layers carry, or the environment's, counts.
        pairs, qk_norms: the host's; this package's own layers are looked for when None.
        example: runs a forward of two rows and returns the model's outputs, the same input on all ranks. With it the
            proving pass runs here, and the outputs are compared with stock; without it the first forward is the pass.
        deterministic: the host is in its deterministic or batch-invariant mode.
        source: where `config` comes from, for the log.
        resolved: the outcome of a host's own `resolve`, in place of config and source.
    Returns: the report. Binding twice with one config returns the first report.
    Raises: ValueError: a malformed config. BindError: strict, or a named backend, and something failed; on all ranks.
    """
    resolved = resolved or _resolve(model, config, source)
    if model in _bound:
        if _bound[model].report.config == resolved.config:
            return _bound[model].report
        unbind(model)
    report = Report(resolved.config, resolved.source, type(model).__name__)
    if resolved.config is None:
        report.off = resolved.reason
        return report
    found = native.find_pairs(model) if pairs is None else pairs
    report.rejected += [pair for pair in found if isinstance(pair, Rejected)]
    found = [pair for pair in found if isinstance(pair, Pair)]
    if not resolved.config.enable_all_reduce_rms_norm:
        report.off = because("disabled", flag="enable_all_reduce_rms_norm")
    elif not found and not report.rejected:
        report.off = because("no_pairs", model=type(model).__name__)
    state = Bound(report)
    try:
        failure = _settle_qk(state, native.find_qk_norms(model) if qk_norms is None else qk_norms)
        if resolved.config.enable_all_reduce_rms_norm:
            _open(state, found, resolved.config, deterministic, failure)
        if failure is not None:
            raise BindError(failure)
        attach_and_prove(model, state, example)
    except BaseException:
        undo_all(state)
        raise
    _bound[model] = state
    report.log(logger)
    return report


def unbind(model: Any) -> None:
    """Collective: restore every instance as it was and close the workspaces. Does nothing to an unbound model.

    A graph that was captured or traced while the model was bound uses them, and must not run again.
    """
    state = _bound.pop(model, None)
    if state is not None:
        undo_all(state)


def report() -> list[Report]:
    """The reports of the models that are bound in this process."""
    return [state.report for state in _bound.values()]


def check() -> None:
    """Raise FusionTimeout if a fused call of any bound model ran out of time. For use before tokens are published."""
    try:
        for state in _bound.values():
            for opening in state.openings:
                opening.opened.check()
    except FusionTimeout:
        metrics.tick(report, every_s=1.0)  # this process may end before the minute is over
        raise
    metrics.tick(report)


def error_pages() -> list[int]:
    """Descriptors of the pages on which fused kernels of this process say that a rank is missing."""
    opened = [opening.opened for state in _bound.values() for opening in state.openings]
    return [one.error_page for one in opened if hasattr(one, "error_page")]


def freeze() -> None:
    """After graph capture: nothing allocates any more, and a rank is waited for `timeout_s`, not ten times that."""
    for state in _bound.values():
        for opening in state.openings:
            opening.opened.freeze()


def _resolve(model: Any, config: Any, source: str) -> Resolved:
    """The config that wins; the layers' own one where none is given."""
    if config is None:
        carried = {
            layer.fusion_config: None
            for layer in model.sublayers(include_self=True)
            if getattr(layer, "fusion_config", None) is not None
        }
        if len(carried) > 1:
            first, second = list(carried)[:2]
            raise ValueError(str(because("two_configs", first=first, second=second)))
        config, source = next(iter(carried), None), "the model's layers"
    return resolve(config, explicit_source=source)


def _settle_qk(state: Bound, norms: Sequence[QKNorm]) -> Reason | None:
    """Choose what the q and k norms run. Returns a failure that the user does not want to be spared."""
    config, report = state.report.config, state.report
    state.qk_norms, report.qk_stock = settle_qk_norms(norms, config)
    report.qk_fused = [norm.name for norm in state.qk_norms]
    insisted = config.strict or config.backend != "auto"
    failed = [why for why in report.qk_stock.values() if why.code in ("backend_failed", "proof_failed")]
    return failed[0] if insisted and failed else None


def _open(state: Bound, pairs: list[Pair], config: FusionConfig, deterministic: bool, failure: Reason | None) -> None:
    """Settle, group by group, which pairs get a Site. `failure` of this rank is a refusal that all ranks hear of."""
    report = state.report
    by_group: dict[Group, list[Pair]] = {}
    for pair in pairs:
        if pair.group.size == 1:
            report.rejected.append(Rejected(pair.name, because("one_rank")))
        else:
            by_group.setdefault(pair.group, []).append(pair)
    spaces = len({(group, pair.hidden_size, pair.dtype) for group in by_group for pair in by_group[group]})
    taken = sum(opening.opened.bytes for bound in _bound.values() for opening in bound.openings)
    room = spaces, (config.workspace_mb << 20) - taken
    # Every rank goes through the groups in one order, so that no two of them wait for each other crosswise.
    for group in sorted(by_group, key=lambda group: (group.size, group.ranks)):
        refusal, each = _structure_refusal(group, by_group[group], config, deterministic, failure, room)
        if refusal is not None:
            refuse(report, by_group[group], *refusal, config)
            continue
        state.groups.append(group)
        _open_group(state, group, by_group[group], config, deterministic, each)


def _open_group(
    state: Bound, group: Group, pairs: list[Pair], config: FusionConfig, deterministic: bool, workspace_bytes: int
) -> None:
    """One workspace for each hidden size and dtype of the group; a Site for each of its pairs."""
    spaces: dict[tuple[int, str], list[Pair]] = {}
    for pair in pairs:
        spaces.setdefault((pair.hidden_size, pair.dtype), []).append(pair)
    for key in sorted(spaces):
        opened, reason, ranks = open_for(group, spaces[key], config, deterministic, workspace_bytes)
        if opened is None:
            refuse(state.report, spaces[key], reason, ranks, config)
            continue
        state.openings.append(opened)
        for pair in spaces[key]:
            site = _site_of(pair, opened)
            state.sites.append((pair, site))
            state.report.add_site(site, opened, group)


def _site_of(pair: Pair, opening: Opening) -> Site:
    run, weight, eps, offset = opening.opened.finish, pair.weight, pair.eps, pair.weight_offset

    def fused(partial, residual):
        if partial.ndim == 2:
            return run(partial, residual, weight(), eps, offset)
        shape, flat = partial.shape, [-1, partial.shape[-1]]
        residual = None if residual is None else residual.reshape(flat)
        norm_out, residual_out = run(partial.reshape(flat), residual, weight(), eps, offset)
        return norm_out.reshape(shape), residual_out.reshape(shape)

    limit, user = opening.opened.limit, runtime.how_to_tell_users()
    return Site(pair.name, fused=fused, reduce=pair.reduce, norm=pair.norm, limit=limit, user=user)


def _structure_refusal(
    group: Group,
    pairs: list[Pair],
    config: FusionConfig,
    deterministic: bool,
    failure: Reason | None,
    room: tuple[int, int],
) -> tuple[tuple[Reason, tuple[int, ...]] | None, int]:
    """The first vote of a group: None if every rank built the same, else (reason, ranks); and the bytes that each of
    its workspaces may have, so that all fit into what is left of `workspace_mb` on every rank.

    Args: room: how many workspaces this rank needs, of all its groups, and the bytes that are left for them.
    """
    shape = [[pair.name, pair.hidden_size, pair.dtype, pair.weight_dtype, pair.weight_offset] for pair in pairs]
    text = json.dumps([__version__, shape, config.to_dict(), deterministic])
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    verdict = agree(group, "structure", Vote(failure, [digest, *room]), timeout_s=config.timeout_s)
    if not verdict.ok:
        return (verdict.reason, tuple(rank for rank, _ in verdict.refusals)), 0
    others = [rank for rank, data in enumerate(verdict.data) if data[0] != verdict.data[0][0]]
    if others:
        detail = f"its pairs, config or version are not those of rank 0 ({len(shape)} pairs on rank {group.rank})"
        return (because("structure_differs", rank=others[0], detail=detail), tuple(others)), 0
    most, least = max(data[1] for data in verdict.data), min(data[2] for data in verdict.data)
    return None, max(0, least) // most
