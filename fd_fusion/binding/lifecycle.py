"""The workspaces that bound models of this process hold: counted, checked, frozen, reset and closed.

A model that is dropped without `unbind` leaves its workspaces open: its peers may still run, and device memory goes
in an order that all ranks keep. They count against `workspace_mb` until all ranks have dropped the model; then the
next `bind`, which is collective, closes them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.reasons import FusionError, because
from fd_fusion.spec import FusedOp

logger = logging.getLogger("fd_fusion")
lock = threading.RLock()  # of all books of bound models; `check` and `bind` may run in two threads
_held: tuple[Space, ...] = ()  # replaced, never changed, so whoever goes through it needs no lock
_opened_by: Counter[str] = Counter()  # workspaces ever opened in a group, by its name: equal on all its ranks


@dataclass(eq=False)
class Space:
    """An open workspace. `number` counts those of its group, so it names the same workspace on every rank."""

    group: Group
    number: int
    op: FusedOp
    dropped: bool = False


def hold(group: Group, op: FusedOp) -> None:
    """Enter a workspace that was opened on all ranks of `group`."""
    global _held
    with lock:
        _opened_by[group.name] += 1
        _held = (*_held, Space(group, _opened_by[group.name], op))


def close(op: FusedOp) -> None:
    """Give a workspace back and strike it off. One that cannot be closed in time is left to the process's end."""
    global _held
    with lock:
        _held = tuple(space for space in _held if space.op is not op)
    with contextlib.suppress(Exception):  # whatever a driver raises at the end: no caller can act on it
        op.close()


def held() -> tuple[Space, ...]:
    """Return every open workspace, oldest first: the same order on all ranks."""
    return _held


def taken_bytes() -> int:
    """Return the bytes of all open workspaces of this process, those of dropped models too."""
    return sum(space.op.bytes for space in _held)


def watch_model(model: Any, ops: Sequence[FusedOp]) -> None:
    """Notice when `model` is garbage collected while these workspaces are open."""
    keys = {(space.group.name, space.number) for space in _held if any(space.op is one for one in ops)}
    weakref.finalize(model, _drop, keys, type(model).__name__).atexit = False


def close_dropped(groups: Sequence[Group], timeout_s: float) -> None:
    """Collective: close the workspaces whose model every rank of its group has dropped. One vote a group."""
    groups = [group for group in groups if _opened_by[group.name]]
    if groups:
        gc.collect()  # a model in a reference cycle is dropped now, not at some later time
    for group in groups:
        mine = {space.number: space for space in _held if space.dropped and space.group.name == group.name}
        with contextlib.suppress(FusionError):  # no store any more: the vote that follows raises
            verdict = agree(group, "dropped", Vote(None, sorted(mine)), timeout_s=timeout_s)
            if not verdict.ok:
                continue
            for number in sorted(set(mine).intersection(*verdict.data)):
                close(mine[number].op)


def freeze() -> None:
    """Wait less for a missing rank from now on. Collective in spirit only: a rank that calls it later waits longer.

        a fused call waits at most   10 x timeout_s before freeze, while a rank may still compile or capture
                                     timeout_s      after it

    For every bound model of this process. FastDeploy's worker calls it after its graphs were captured. A model of
    this package's own layers freezes by itself when the second eager forward after its proving pass starts (the
    first has run every fused op, so nothing is left to compile), or at the first later one that is not being
    captured; call `freeze()` where all that follows are replays of graphs. Not while a graph is being captured.
    `check`, `reset` and `bind` may follow it; a model that is bound later starts with the long wait.
    Raises: FusionError (`closed`): the model was unbound by another thread meanwhile.
    """
    for space in _held:
        space.op.freeze()


def reset() -> None:
    """Collective: go on after a FusionTimeout. Every rank calls it, with no fused call under way on any of them.

    Every workspace of this process is reset, oldest first: all ranks wait until all have ended what they run, then
    clear their memory, and vote on the outcome. Each is usable again on all ranks of its group, or on none.

        a silent rank is waited for at most   2 x t + t for each workspace,
                                              t = timeout_s once frozen, else 10 x timeout_s

    Numbers that were computed between the timeout and the reset are NaN or unfit: throw them away.
    Raises: FusionError: a rank is missing (`never_voted`), or could not clear its memory; that workspace stays dead,
        the others were reset all the same. Restart the ranks then.
    """
    errors = []
    for space in _held:
        try:
            space.op.reset()
        except FusionError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def check() -> None:
    """Raise FusionTimeout if a call of a model that is bound ran out of time."""
    for space in _held:
        try:
            if not space.dropped:
                space.op.check()
        except FusionError as error:
            if error.reason.code != "closed":  # unbound by another thread meanwhile
                raise


def _drop(keys: set[tuple[str, int]], name: str) -> None:
    """Mark the workspaces of a model that is gone; close none: the collector runs at any time, on one rank alone."""
    spaces = [space for space in _held if (space.group.name, space.number) in keys]
    for space in spaces:
        space.dropped = True
    if spaces:
        nbytes = sum(space.op.bytes for space in spaces)
        reason = because("dropped", model=name, bytes=nbytes)
        logger.warning("fd_fusion: %s; %s", reason, reason.remedy)
