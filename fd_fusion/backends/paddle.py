"""Plain Paddle ops as a backend: all-gather, then sum and norm in the contract's order; runs wherever Paddle does."""

from __future__ import annotations

import paddle
import paddle.distributed as dist

from fd_fusion.comm.group import Group
from fd_fusion.frameworks.paddle_ops import rms_norm
from fd_fusion.reasons import Reason, because, closed
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.spec import OpSpec
from fd_fusion.tuning.limits import row_limit


def supports(spec: OpSpec) -> Reason | None:
    """Return why this backend cannot run `spec`, or None: the dtype, or the host's deterministic mode.

    Its bits are the same for every T, but a call gathers N x T x H numbers, so that T has a limit, and the stock path
    beyond that limit gives other bits.
    """
    if spec.dtype not in DTYPE_BYTES:
        return because("dtype", got=spec.dtype, allowed=", ".join(DTYPE_BYTES))
    if spec.deterministic:
        return because("deterministic", backend="paddle")
    return None


class PaddleOp:
    """Gather the partial sums and add them in rank order, in float32. There is no workspace."""

    bytes = 0
    fp8 = ()
    in_rank_order = True
    error_page = None
    _closed = False

    def __init__(self, spec: OpSpec, group: Group):
        self.limit = row_limit(spec)
        self._group = group

    def finish(self, partial, residual, weight, eps, weight_offset):
        """Compute `reference.all_reduce_rms_norm`, in its order; [T, H] -> (norm_out, residual_out)."""
        self.check()
        parts: list[paddle.Tensor] = []
        dist.all_gather(parts, partial.contiguous(), group=self._group.handle)
        total = parts[0].astype("float32")
        for part in parts[1:]:
            total = total + part.astype("float32")
        if residual is not None:
            total = total + residual.astype("float32")
        out, _ = rms_norm(total, weight, eps=eps, weight_offset=weight_offset)
        return out.astype(partial.dtype), total.astype(partial.dtype)

    def check(self) -> None:
        """Raise nothing but `closed`: a collective that runs out of time raises by itself, and there is no state."""
        if self._closed:
            closed()

    freeze = reset = check

    def stats(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """Make every later call raise `closed`."""
        self._closed = True


def open(spec: OpSpec, group: Group) -> PaddleOp:
    """Return the op of one group, hidden size and dtype. Needs no vote, since nothing can fail."""
    return PaddleOp(spec, group)
