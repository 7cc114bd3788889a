"""What the triton backend fixes before its workspace is open: whether it can run, the plan, kernels and memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Collection, Iterator
from typing import Any

from fd_fusion.comm.workspace import Layout
from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.error_page import ERROR_PAGE_BYTES, reason_of
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.spec import OpSpec
from fd_fusion.tuning.limits import NEVER, row_limit

ONE_SHOT, TWO_SHOT, STAYS = 0, 1, 2  # STAYS: two-shot with a residual that stays with the owner of each row
ANY_ADDRESS = 1 << 40  # what a kernel is compiled for: an int64; nothing is specialized on its value
LIKE = (*(ANY_ADDRESS,) * 7, 2, 2, 0, 0, 1e-5, 0.0)


def supports(spec: OpSpec) -> Reason | None:
    """Return why this rank cannot run the kernel, or None. Imports nothing and allocates nothing."""
    if importlib.util.find_spec("triton") is None:
        return because("no_triton", detail="it is not installed")
    if spec.size not in plans.SIZES:
        return because("world_size", got=spec.size, allowed=f"{plans.SIZES[0]} to {plans.SIZES[-1]}")
    for dtype in (spec.dtype, *spec.weight_dtypes):
        if dtype not in DTYPE_BYTES:
            return because("dtype", got=dtype, allowed=", ".join(DTYPE_BYTES))
    if spec.hidden_size * DTYPE_BYTES[spec.dtype] % 16:
        return because("hidden_size", got=spec.hidden_size, need="a whole number of 16-byte units")
    if not plans.SMALLEST <= spec.eps < float("inf"):
        return because("eps", got=spec.eps)
    if spec.device == "gpu" and (spec.arch or 0) < 80:
        return because("old_gpu", got=spec.arch, need=80)
    plan = plan_of(spec)
    if (need := plans.total_bytes(plan, 1)) > spec.workspace_bytes:
        return because("workspace_small", need=need, got=spec.workspace_bytes)
    return None


def plan_of(spec: OpSpec) -> plans.Plan:
    """Return the kernel's plan, with the tuning table's limit of one-shot where there is one."""
    how = {"interpreted": spec.device == "cpu", "fp8": bool(spec.fp8)}
    plan = plans.plan_for(spec.size, spec.hidden_size, spec.dtype, **how)
    if spec.two_shot_rows is None:
        return plan
    return dataclasses.replace(plan, two_shot_rows=None if spec.two_shot_rows == NEVER else spec.two_shot_rows)


def compile_kernels(
    spec: OpSpec, plan: plans.Plan, paths: Collection[int], in_rounds: bool
) -> dict[tuple[str, int, bool, bool], triton_launch.Loaded]:
    """Compile every kernel that a call of these paths may need, by (weight dtype, path, without residual, in rounds):
    none compiles later.

    No kernel is specialized on the value of an argument, so that each is right for all calls of its sort.
    """
    kernel = triton_launch.load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
    return {
        variant: triton_launch.prepare(kernel, LIKE, plans.constants(plan, **how), spec.device)
        for variant, how in variants(spec, paths, in_rounds)
    }


def variants(
    spec: OpSpec, paths: Collection[int], in_rounds: bool
) -> Iterator[tuple[tuple[str, int, bool, bool], dict[str, Any]]]:
    """Yield (weight dtype, path, without residual, in rounds) of each kernel, and these as arguments of
    `plans.constants`."""
    pdl = spec.device == "gpu" and triton_launch.uses_pdl()
    for name, path in itertools.product(spec.weight_dtypes, paths):
        how = {"weight_dtype": name, "two_shot": path != ONE_SHOT, "residual_stays": path == STAYS, "pdl": pdl}
        for bare in (False,) if path == STAYS else (False, True):
            yield (name, path, bare, in_rounds), {**how, "has_residual": not bare, "rounds": in_rounds}


def paths_of(spec: OpSpec, plan: plans.Plan) -> tuple[int, ...]:
    """Return the paths that a call may take. Of two ranks one-shot is the faster, so no residual stays there; nor
    where there is no slot for each rank, since a row's owner would depend on how a call is cut (`plans.launches`)."""
    if plan.two_shot_rows is None:
        return (ONE_SHOT, TWO_SHOT) if spec.device == "cpu" else (ONE_SHOT,)
    limit = row_limit(spec, stays=True)
    fits = plans.total_bytes(plan, spec.size) <= spec.workspace_bytes
    is_used = fits and spec.size > 2 and (limit is None or plan.two_shot_rows <= limit)
    return (ONE_SHOT, TWO_SHOT, STAYS) if is_used else (ONE_SHOT, TWO_SHOT)


def paths_in_rounds(spec: OpSpec, plan: plans.Plan, slots: int, at_once: dict[int, int]) -> list[int]:
    """Return the paths of `at_once` whose calls may have rounds: more rows than slots, and a row for each program and
    owner in each of two rounds. What has stayed is read, up to its own limit, by calls that send it back."""
    limit = row_limit(spec, stays=STAYS in at_once)
    limit = math.inf if limit is None else limit

    def may_have(path: int) -> bool:
        if path == ONE_SHOT:
            owners, least, most = 1, 1, min(limit, (plan.two_shot_rows or math.inf) - 1)
        else:
            owners, least, most = spec.size, plan.two_shot_rows or 1, limit
        return max(slots + 1, least) <= most and at_once[path] * owners <= min(slots, most / 2)

    return [path for path in at_once if may_have(path)]


def layout_of(plan: plans.Plan, slots: int) -> Layout:
    """Return the memory of a workspace: what is symmetric, what is local, and how the error page is read."""
    return Layout(
        control_bytes=plans.CONTROL_BYTES,
        symmetric_bytes=plans.symmetric_bytes(plan, slots),
        fill=plans.SLOT_FILL,
        local_bytes=plans.state_memory_bytes(plan, slots),
        local_words=lambda limit, page, addresses: plans.state_memory_words(
            plan, slots, limit=limit, error_page=page, addresses=addresses
        ),
        page_bytes=ERROR_PAGE_BYTES,
        read_error=reason_of,
    )
