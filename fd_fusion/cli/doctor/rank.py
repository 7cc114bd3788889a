"""One rank of `doctor`'s launch: open the triton backend, call it, compare with the reference."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np

from fd_fusion import reference
from fd_fusion.cli.doctor.child import LAUNCHED_ROWS, spec_for
from fd_fusion.cli.processes.ranks import Progress, rank_main
from fd_fusion.comm.group import Group, working
from fd_fusion.frameworks.tensors import numbers, place, tensor
from fd_fusion.spec import FusedOp, OpSpec


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Return worst error over its budget (at most 1 is right), a digest of all bits, whether the device counted as
    many rows as were asked for, how long the opening took.
    """
    from fd_fusion.backends import triton as backend

    progress, (framework, device, arch) = Progress(), place(group.rank)
    spec = spec_for(group.size, device, arch, group.rank)
    start = time.monotonic()
    with working(group):
        op = backend.open(spec, group)
    try:
        opened_s = time.monotonic() - start
        worst, digest, before = 0.0, hashlib.sha256(), op.stats()["device"]["rows"]
        for rows in LAUNCHED_ROWS[device]:
            error, bits = one_call(framework, op, spec, rows)
            progress.step()
            worst = max(worst, error)
            digest.update(bits)
        op.check()
        counted = op.stats()["device"]["rows"] - before == sum(LAUNCHED_ROWS[device])
        return {"worst": worst, "digest": digest.hexdigest(), "counted": counted, "opened_s": opened_s}
    finally:
        op.close()


def one_call(framework: Any, op: FusedOp, spec: OpSpec, rows: int) -> tuple[float, bytes]:
    """Make one fused call on known numbers: (error over budget, the bits of both outputs)."""
    partials, residual, weight = _values(spec, rows)
    arrays = partials[spec.rank], residual, weight
    got = op.finish(*(tensor(framework, x, spec.dtype, spec.device) for x in arrays), spec.eps, 0.0)
    with np.errstate(all="ignore"):
        truth = reference.all_reduce_rms_norm(partials, residual, weight, eps=spec.eps)
    plain = _plain(partials, residual, weight, spec)
    worst, bits = 0.0, b""
    for ours, true, rough in zip(got, truth, plain):
        values = numbers(ours)
        allowed = reference.budget(float(np.abs(rough - true).max()), spec.dtype, float(np.abs(true).max()))
        error = float(np.abs(values - true).max())
        worst = max(worst, error / allowed if np.isfinite(error) else float("inf"))
        bits += values.tobytes()
    return worst, bits


def _values(spec: OpSpec, rows: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    def draw(who: int, *shape: int) -> np.ndarray:
        values = np.random.default_rng([rows, who]).standard_normal(shape, np.float32)
        return reference.round_to(values, spec.dtype).astype(np.float32)

    partials = [draw(rank, rows, spec.hidden_size) for rank in range(spec.size)]
    return partials, draw(100, rows, spec.hidden_size), draw(101, spec.hidden_size)


def _plain(partials: list, residual: np.ndarray, weight: np.ndarray, spec: OpSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return what an all-reduce and a norm in the same dtype give, every sum rounded: the measure of the budget."""
    total = partials[0]
    for part in [*partials[1:], residual]:
        total = reference.round_to(total + part, spec.dtype).astype(np.float32)
    norm = reference.rms_norm(total, weight, eps=spec.eps, dtype=np.float32)
    return reference.round_to(norm, spec.dtype).astype(np.float64), total.astype(np.float64)


if __name__ == "__main__":
    rank_main(run)
