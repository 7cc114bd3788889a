"""One rank of `doctor`'s launch: open the triton backend, call it, compare with the reference."""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any

import numpy as np

from fd_fusion import reference
from fd_fusion.cli.doctor.child import devices, spec_for
from fd_fusion.cli.processes.ranks import rank_main
from fd_fusion.comm.group import Group, working
from fd_fusion.frameworks import triton_launch as runtime_triton
from fd_fusion.spec import FusedOp, OpSpec

_ROWS = {"cpu": (1, 3), "gpu": (1, 5, 64)}


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Returns: worst error over its budget (at most 1 is right), a digest of all bits, whether the device counted
    as many rows as were asked for, what the workspace took.
    """
    from fd_fusion.backends import triton as backend

    here, device, arch = place(group.rank)
    spec = spec_for(group.size, device, arch, group.rank)
    start = time.monotonic()
    with working(group):
        op = backend.open(spec, group)
    try:
        opened_s = time.monotonic() - start
        worst, digest, before = 0.0, hashlib.sha256(), op.stats()["device"]["rows"]
        for rows in _ROWS[device]:
            error, bits = one_call(here, op, spec, rows)
            worst = max(worst, error)
            digest.update(bits)
        op.check()
        counted = op.stats()["device"]["rows"] - before
        right = {"worst": worst, "digest": digest.hexdigest(), "counted": counted == sum(_ROWS[device])}
        return {**right, "bytes": op.bytes, "opened_s": opened_s}
    finally:
        op.close()


def place(rank: int) -> tuple[Any, str, int | None]:
    """Put this process on its device. Returns (paddle or torch, "cpu" or "gpu", arch)."""
    here = runtime_triton.framework()
    device, arch, count = devices(here)
    if here.__name__ == "paddle":
        here.set_device(f"gpu:{rank % count}" if count else "cpu")
        here.set_grad_enabled(False)
    elif count:
        here.cuda.set_device(rank % count)
    if count:
        tensor(here, np.zeros(1, np.float32), "float32")  # makes the context current
    return here, device, arch


def tensor(here: Any, values: np.ndarray, dtype: str) -> Any:
    """A tensor of Paddle or torch on this rank's device, of values that `dtype` holds exactly."""
    if here.__name__ == "paddle":
        return here.to_tensor(values).astype(dtype)
    made = here.from_numpy(values).to(getattr(here, dtype))
    return made.cuda() if here.cuda.is_available() else made


def numbers(here: Any, made: Any) -> np.ndarray:
    """The values of a tensor, float32."""
    return made.astype("float32").numpy() if here.__name__ == "paddle" else made.float().cpu().numpy()


def one_call(here: Any, op: FusedOp, spec: OpSpec, rows: int) -> tuple[float, bytes]:
    """One fused call on known numbers: (error over budget, the bits of both outputs)."""
    partials, residual, weight = _values(spec, rows)
    got = op.finish(*(tensor(here, x, spec.dtype) for x in (partials[spec.rank], residual, weight)), spec.eps, 0.0)
    with np.errstate(all="ignore"):
        truth = reference.all_reduce_rms_norm(partials, residual, weight, eps=spec.eps)
    plain = _plain(partials, residual, weight, spec)
    worst, bits = 0.0, b""
    for ours, true, rough in zip(got, truth, plain):
        values = numbers(here, ours)
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
    """What an all-reduce and a norm in the same dtype give, every sum rounded: the measure of the budget."""
    total = partials[0]
    for part in [*partials[1:], residual]:
        total = reference.round_to(total + part, spec.dtype).astype(np.float32)
    norm = reference.rms_norm(total, weight, eps=spec.eps, dtype=np.float32)
    return reference.round_to(norm, spec.dtype).astype(np.float64), total.astype(np.float64)


if __name__ == "__main__":
    sys.exit(rank_main(run))
