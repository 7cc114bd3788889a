"""One rank of `tune`: every path that can run here, at every number of rows; in its own process, on its own GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fd_fusion.backends.triton_setup import plan_of
from fd_fusion.binding.backend_selection import load_backend
from fd_fusion.cli.doctor.rank import one_call
from fd_fusion.cli.processes.ranks import Progress, rank_main
from fd_fusion.cli.tune.rival import Rival, open_rivals, told
from fd_fusion.comm.group import Group, working
from fd_fusion.comm.symmetric_memory import on_all_ranks
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.frameworks.tensors import place, synchronize, tensor
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.reasons import FusionError, because
from fd_fusion.spec import FusedOp, OpSpec
from fd_fusion.tuning.limits import NEVER

_CHECKED_ROWS = 64  # calls of more rows are not compared with the reference: that takes longer than timing them
_CALLS = 20  # of a graph
_REPLAYS = 5  # of a measurement
_COLUMNS = {  # name -> backend, where its two-shot begins, whether the residual stays with its owners
    "one_shot": ("triton", NEVER, False),
    "two_shot": ("triton", 1, False),
    "staying": ("triton", 1, True),
    "flashinfer": ("flashinfer", None, False),
}


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Returns {"times": {column: {rows: us}}, "skipped": {column: why}, "rival": what "unfused" is, "gpu": name}."""
    progress, (framework, device, arch) = Progress(), place(group.rank)
    limits = {"max_token_num": max(job["rows"]), "timeout_s": job["timeout_s"]}
    limits["workspace_bytes"] = job["workspace_mb"] << 20
    spec = OpSpec(group.rank, group.size, job["hidden_size"], job["dtype"], device=device, arch=arch, **limits)
    times: dict[str, dict[int, float]] = {}
    skipped: dict[str, str] = {}
    for number, (column, (backend, switch, stays)) in enumerate(_COLUMNS.items(), 1):
        if stays and group.size == 2:
            continue
        try:
            of_path = dataclasses.replace(spec, two_shot_rows=switch)
            times[column] = _column(framework, group, of_path, backend, stays, job, progress)
        except FusionError as error:  # told by all ranks alike, since opening is collective
            skipped[column] = str(error.reason)
        progress.step(to=number * len(job["rows"]))
    times["unfused"], rival, without = _unfused(framework, spec, group, job)
    skipped |= without
    agree(group, "end", Vote(), timeout_s=job["timeout_s"])  # the framework's store lives on rank 0
    gpu = framework.cuda.get_device_name() if device == "gpu" else None
    return {"times": times, "skipped": skipped, "rival": rival, "gpu": gpu}


def _column(
    framework: Any, group: Group, spec: OpSpec, backend: str, stays: bool, job: dict[str, Any], progress: Progress
) -> dict[int, float]:
    """Open, compare with the reference, time. Nothing that is wrong is timed."""
    module, refusal = load_backend(backend, [spec])
    if refusal is not None:
        raise FusionError(refusal)
    with working(group):
        op = module.open(spec, group)
    try:
        if stays and not op.may_stay:
            need = plans.total_bytes(plan_of(spec), spec.size)
            raise FusionError(because("workspace_small", need=need, got=spec.workspace_bytes))
        rows = [t for t in job["rows"] if op.limit is None or t <= op.limit]
        for t in [t for t in rows if t <= _CHECKED_ROWS][:3]:
            _check(framework, spec, op, backend, t)
        times = {}
        for t in rows:
            x, residual, weight = _tensors(framework, spec, t)
            call = partial(op.finish, x, residual, weight, spec.eps, 0.0, *((True,) if stays else ()))
            times[t] = _time(framework, spec, call, job["rounds"])
            op.check()
            progress.step()
        return times
    finally:
        op.close()


def _check(framework: Any, spec: OpSpec, op: FusedOp | Rival, name: str, rows: int) -> None:
    """Raise FusionError for numbers that are not those of the reference."""
    error, _ = one_call(framework, op, spec, rows)
    if not error <= 1:
        wrong = f"wrong numbers at T={rows}: {error:.2f} of the budget"
        raise FusionError(because("backend_failed", backend=name, error=wrong))


def _tensors(framework: Any, spec: OpSpec, rows: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(rows)
    shapes = ((rows, spec.hidden_size), (rows, spec.hidden_size), (spec.hidden_size,))
    arrays = [random.standard_normal(shape, np.float32) for shape in shapes]
    return tuple(tensor(framework, values, spec.dtype, spec.device) for values in arrays)


def _time(
    framework: Any, spec: OpSpec, call: Callable[[], Any], rounds: int, capturing: Callable = contextlib.nullcontext
) -> float:
    """Median time of a call in microseconds: of graph replays on a GPU, of plain calls under the interpreter."""
    if spec.device == "cpu":
        call()
        return statistics.median(_clock_us(call) for _ in range(rounds))
    for _ in range(3):
        call()
    synchronize(framework)
    with capturing():
        replay = _graph(framework, call)

    def replays() -> None:
        for _ in range(_REPLAYS):
            replay()
        synchronize(framework)

    replays()
    return statistics.median(_clock_us(replays) for _ in range(rounds)) / (_CALLS * _REPLAYS)


def _clock_us(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - start)


def _graph(framework: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a few calls, one after another. Returns what replays it."""
    if framework.__name__ == "paddle":
        here = framework.CUDAPlace(framework.cuda.current_device())  # CUDAGraph() means GPU 0, on every rank
        graph = importlib.import_module("paddle.device.cuda.graphs").CUDAGraph(here)
        graph.capture_begin()
        kept = [call() for _ in range(_CALLS)]
        graph.capture_end()
    else:
        graph = framework.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile: NCCL has one that looks at events.
        with framework.cuda.graph(graph, capture_error_mode="thread_local"):
            kept = [call() for _ in range(_CALLS)]

    def replay(_kept: Any = kept) -> None:  # the graph writes into these outputs
        graph.replay()

    return replay


def _unfused(
    framework: Any, spec: OpSpec, group: Group, job: dict[str, Any]
) -> tuple[dict[int, float], str, dict[str, str]]:
    """The times of what is not fused, what that is, and what of it could not be measured, with why."""
    rivals, skipped = open_rivals(framework, spec, group, job)
    times: dict[int, float] = {}
    right: list[Rival] = []
    for rival in rivals:
        mine = [t for t in job["rows"] if t <= rival.most_rows and t not in times]
        if not mine:
            continue
        topic, wait_s = f"rival {rival.name}", 3 * job["timeout_s"]
        try:
            on_all_ranks(group, topic, partial(_check, framework, spec, rival, rival.name, mine[0]), wait_s)
            times |= on_all_ranks(group, topic, partial(_times, framework, spec, rival, mine, job), wait_s)
            right.append(rival)
        except FusionError as error:  # the next rival that takes these rows stands in
            skipped[rival.name] = str(error.reason)
    synchronize(framework)
    for rival in rivals:
        rival.close()
    return times, told(right) if right else "", skipped


def _times(framework: Any, spec: OpSpec, rival: Rival, rows: list[int], job: dict[str, Any]) -> dict[int, float]:
    """The time of each call by the fastest norm. Raises RuntimeError: they mean nothing."""
    times = {}
    for t in rows:
        calls = [partial(rival.call, norm, *_tensors(framework, spec, t)) for norm in rival.norms]
        times[t] = min(_time(framework, spec, call, job["rounds"], rival.capturing) for call in calls)
    rival.check()
    return times


if __name__ == "__main__":
    rank_main(run)
