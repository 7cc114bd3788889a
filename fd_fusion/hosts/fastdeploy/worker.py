"""The three places of a FastDeploy worker that fusion changes.

before tokens leave the process    no token computed past a timeout is published
before graphs are captured         a model whose first forward is still to come is proven first
after graphs are captured          workspaces are frozen, and a rank that falls silent is named from now on

A rank that is missing leaves this one in whatever waits for it: a fused call, a collective of the host, its barrier.
No call can be taken back, so a process beside this one (comm/sentinel.py) writes the one sentence and ends it. The
launcher then ends the other ranks, and the server itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fd_fusion  # its functions load what they need on first use: this module is imported before Paddle
from fd_fusion.binding.attributes import set_attribute, undo_in_turn
from fd_fusion.comm import sentinel, watcher
from fd_fusion.comm.group import Group
from fd_fusion.comm.presence import PresenceMemory
from fd_fusion.frameworks.tensors import paddle_or_torch, synchronize
from fd_fusion.hosts.fastdeploy.log import log_file
from fd_fusion.reasons import BindError, FusionError, Reason, because

logger = logging.getLogger("fd_fusion")
# From the sentence to the end of the process: in this time the host may end by itself, with a traceback.
GRACE_S = 2.0
_READER = "fd_fusion.kernels.all_reduce.error_page:reason_of"

_RUNNER = "fastdeploy.worker.gpu_model_runner"
_WORKER = "fastdeploy.worker.gpu_worker"
_undo: list[Callable[[], None]] = []
# By the ranks of a group: the memory of their counts, and timeout_s.
_opened: dict[tuple[int, ...], tuple[PresenceMemory, float]] = {}
_sentinels: dict[tuple[int, ...], subprocess.Popen] = {}
_up = False  # whether the host has come up
_for_us = False  # whether a forward is under way that the stock host would not run


def patch() -> Reason | None:
    """Patch the worker of this process, once. Returns the reason, with the dotted path, if a symbol is not there."""
    if _undo:
        return None
    runner, worker = sys.modules.get(_RUNNER), sys.modules.get(_WORKER)
    known = getattr(runner, "GPUModelRunner", None)
    runner_class = getattr(worker, "ModelRunner", known)  # a plugin, or another version, may bring its own
    if known is None or not issubclass(runner_class, known):
        return because("symbol_moved", path=f"{_RUNNER}.GPUModelRunner as {_WORKER}.ModelRunner")
    # A newer version publishes in _save_model_output, behind a wait for the step; an older one in post_process.
    saves = hasattr(runner_class, "_save_model_output")
    if not saves and not hasattr(runner, "post_process"):
        return because("symbol_moved", path=f"{_RUNNER}.GPUModelRunner._save_model_output")
    worker_class = getattr(worker, "GpuWorker", None)
    if not hasattr(worker_class, "graph_optimize_and_warm_up_model") or not hasattr(runner_class, "_dummy_run"):
        return because("symbol_moved", path=f"{_WORKER}.GpuWorker.graph_optimize_and_warm_up_model")
    if saves:
        _replace(runner_class, "_save_model_output", _checked)
    if hasattr(runner, "post_process"):
        _replace(runner, "post_process", lambda stock: _checked_once_done(stock, pooled_alone=saves))
    _replace(worker_class, "graph_optimize_and_warm_up_model", lambda stock: _proven_before_capture(stock, False))
    if hasattr(runner_class, "capture_model"):  # by itself once weights were updated, or reloaded after a sleep
        _replace(runner_class, "capture_model", lambda stock: _proven_before_capture(stock, True))
    return None


def unpatch() -> None:
    global _up
    undo_in_turn(_undo)
    watcher.end_process_on_error(None)
    _leave(os.getpid())
    _up = False


def meet(groups: Iterable[Group], timeout_s: float) -> None:
    """Collective, behind bind: open what names a rank of these groups that is silent for `timeout_s`."""
    for group in sorted({group.ranks: group for group in groups}.values(), key=lambda group: group.ranks):
        if group.size == 1 or group.ranks in _opened:
            continue
        try:
            _opened[group.ranks] = PresenceMemory(group, timeout_s), timeout_s
        except FusionError as error:  # on all ranks alike; fusion does not depend on it
            logger.warning("fd_fusion: %s", because("no_presence", why=error))
    if _up:  # a model that was bound late
        watch()
        if not _for_us:  # in a forward of the host's: no capture follows, which would freeze it
            from fd_fusion.binding import lifecycle

            lifecycle.freeze()


def watch() -> None:
    """End this process, now that the host has come up, when a rank falls silent or a call runs out of time.

    This process counts as well: a sentinel that was killed is not its rank's silence.
    """
    global _up
    from fd_fusion.binding.bind import error_pages

    _up = True
    if not any(report.sites for report in fd_fusion.report()):
        return
    watcher.end_process_on_error(GRACE_S)
    pages = error_pages()
    for ranks, (memory, limit_s) in _opened.items():
        if ranks not in _sentinels:  # the host captures its graphs anew when it likes
            _sentinels[ranks] = sentinel.start(memory, limit_s, GRACE_S + 1, log_file(), pages, _READER)
            watcher.watch(memory, memory.presence.beat, lambda error: None)
    atexit.register(_leave, os.getpid())


def _leave(pid: int) -> None:
    """Leave in order: the other ranks do not miss this process any more. A forked child ends by itself."""
    if os.getpid() != pid:
        return
    while _sentinels:
        _, process = _sentinels.popitem()
        process.kill()
        process.wait()
    while _opened:
        memory, _ = _opened.popitem()[1]
        watcher.unwatch(memory)
        memory.presence.leave()


def _replace(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    stock = getattr(owner, name)
    _undo.append(set_attribute(owner, name, functools.wraps(stock)(wrap(stock))))


def _checked(stock: Callable) -> Callable:
    """Return `stock`, which publishes a step that has ended, behind a check of that step."""

    def publish(*args, **kwargs):
        fd_fusion.check()
        return stock(*args, **kwargs)

    return publish


def _checked_once_done(stock: Callable, pooled_alone: bool) -> Callable:
    """Return `post_process`, whose step may still be running, behind a wait for that step and its check.

    A pooling model's output leaves by it in every version. `pooled_alone`: all else leaves in _save_model_output,
    which checks it, so that a step is checked once.
    """
    checked = _checked(stock)

    def publish(*args, **kwargs):
        from fd_fusion.binding import lifecycle

        output = args[0] if args else kwargs.get("sampler_or_pooler_output")
        if pooled_alone and type(output).__name__ != "PoolerOutput":
            return stock(*args, **kwargs)
        if lifecycle.held():
            synchronize(paddle_or_torch())
        return checked(*args, **kwargs)

    return publish


def _proven_before_capture(stock: Callable, of_runner: bool) -> Callable:
    """Return the worker's capture, behind which the host has come up, or the runner's, which is a part of it."""

    def capture(self, *args, **kwargs):
        with _never_in_a_graph(self if of_runner else self.model_runner):
            result = stock(self, *args, **kwargs)
        if _up or not of_runner:  # the first time more is captured behind the runner's
            fd_fusion.freeze()
        if not of_runner:
            watch()
        return result

    return capture


def _waits(model: Any) -> bool:
    return getattr(model.__dict__.get("forward"), "binds_at_first_call", False)


@contextlib.contextmanager
def _never_in_a_graph(runner: Any) -> Iterator[None]:
    """Prove a model whose first forward is still to come: the host did not profile, or its weights came later.

    One that even this forward cannot prove, with zero weights for example, is captured as stock: no forward votes
    while a graph is captured. It is tried again afterwards.
    """
    model = runner.model
    if _waits(model):
        _dummy_run_for_us(runner)
    undo = [set_attribute(model, "forward", model.__dict__["forward"].__wrapped__)] if _waits(model) else []
    try:
        yield
    finally:
        undo_in_turn(undo)


def end_our_forward(reason: Reason) -> None:
    """Raise if a rank never voted in a forward of ours. In one of the host that rank takes part, and it goes on;
    otherwise the rank got no config, is not in the forward, and would come to none of its collectives. Raises:
    BindError.
    """
    if _for_us:
        logger.error("fd_fusion: %s; %s; this process ends", reason, reason.remedy)
        raise BindError(reason)


def _dummy_run_for_us(runner: Any) -> None:
    global _for_us
    from fd_fusion.hosts.fastdeploy.untouched import untouched

    _for_us = True
    try:
        with untouched(runner):
            _eagerly(lambda: runner._dummy_run(num_tokens=2, batch_size=1))
    finally:
        _for_us = False


def _eagerly(run: Callable[[], Any]) -> None:
    """Run outside graph optimisation, by the guard that the host has for its profile run."""
    try:
        from fastdeploy.model_executor.graph_optimization.utils import profile_run_guard
    except ImportError:
        run()
    else:
        profile_run_guard(True)(run)()
