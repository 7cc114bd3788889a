"""Plain Paddle ops: the formulas, the all-reduce, and a backend that runs wherever Paddle does.

On a CPU Paddle has no half-precision add, matmul, rsqrt or mean, and gloo's float16 sum silently returns inf. So
halves are summed and normalised in float32 here, and rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import paddle
import paddle.distributed as dist

from fd_fusion.comm.group import Group
from fd_fusion.frameworks import paddle_runtime as runtime
from fd_fusion.reasons import Reason, because, closed
from fd_fusion.spec import OpSpec
from fd_fusion.tuning.limits import row_limit

DTYPES = ("float32", "bfloat16", "float16")


def dtype_name(tensor: paddle.Tensor) -> str:
    """ "float32", "bfloat16" ...: the dtype without its framework's prefix."""
    return str(tensor.dtype).rpartition(".")[2]


def group_of(handle: Any = None) -> Group:
    """The `Group` of a Paddle process group; the default group for None; one rank where nothing is initialised.

    The rank and the size are the group's own, never the global ones.
    """
    if handle is None:
        if not dist.is_initialized():
            return Group("0", 0, 1, (0,), None)
        handle = dist.get_group(0)
    group = _group((*handle.ranks,), handle.rank)
    return group if group.handle is handle else _with_handle(group, handle)


@functools.cache
def _group(ranks: tuple[int, ...], rank: int) -> Group:
    """One object for each set of ranks, since it counts the votes that they held together."""
    return Group("-".join(map(str, ranks)), rank, len(ranks), ranks, runtime.tcp_store() if len(ranks) > 1 else None)


def _with_handle(group: Group, handle: Any) -> Group:
    object.__setattr__(group, "handle", handle)
    return group


def _needs_wide(x: paddle.Tensor) -> bool:
    """Whether Paddle lacks the arithmetic for this dtype here, or gets it wrong."""
    return dtype_name(x) in ("bfloat16", "float16") and runtime.device_of()[0] == "cpu"


def all_reduce(x: paddle.Tensor, handle: Any = None) -> paddle.Tensor:
    """Sum `x` over the group: in place where the backend does so, in float32 for halves on a CPU. Returns the sum."""
    if 0 in x.shape or group_of(handle).size == 1:
        return x
    if _needs_wide(x):
        wide = x.astype("float32")
        dist.all_reduce(wide, group=handle)
        return wide.astype(x.dtype)
    dist.all_reduce(x, group=handle)
    return x


def rms_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Add the residual, normalise each row; float32 arithmetic, one rounding for each result.

        s = x + residual;   norm_out = s * rsqrt(mean(s^2) + eps) * (weight + weight_offset);   residual_out = s

    Args: x, residual: [..., H], of one dtype. weight: [H], that dtype or float32.
    Returns: (norm_out, residual_out) in the dtype of x. Without a residual, residual_out is x itself.
    """
    s = x.astype("float32")
    if residual is not None:
        s = s + residual.astype("float32")
    scale = paddle.rsqrt((s * s).mean(-1, keepdim=True) + eps)
    out = s * scale * (weight.astype("float32") + weight_offset)
    return out.astype(x.dtype), x if residual is None else s.astype(x.dtype)


def linear(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
    """x W + bias; in float32, rounded once, for halves on a CPU. x [..., K], weight [K, H], bias [H]."""
    if not _needs_wide(x):
        return paddle.nn.functional.linear(x, weight, bias)
    wide = x.astype("float32") @ weight.astype("float32")
    return (wide if bias is None else wide + bias.astype("float32")).astype(x.dtype)


def supports(spec: OpSpec) -> Reason | None:
    """Runs for every device and size; only the dtype and the host's deterministic mode can say no.

    It gives the same bits for every T, but one call gathers N x T x H numbers, so T has a limit, and the stock path
    beyond it gives other bits.
    """
    if spec.dtype not in DTYPES:
        return because("dtype", got=spec.dtype, allowed=", ".join(DTYPES))
    if spec.deterministic:
        return because("deterministic", backend="paddle")
    return None


class PaddleOp:
    """Gather the partial sums and add them in rank order, in float32. Nothing is held open."""

    bytes = 0
    in_rank_order = True  # the exact bits of the contract's sum
    error_page = None  # no kernel that could write one
    _closed = False

    def __init__(self, spec: OpSpec, group: Group):
        self.limit = row_limit(spec)
        self._group = group

    def finish(self, partial, residual, weight, eps, weight_offset):
        """The formula of `reference.all_reduce_rms_norm`, in its order; [T, H] -> (norm_out, residual_out)."""
        self._need_open()
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
        """Nothing can run out of time here unseen: a collective of the framework raises by itself."""
        self._need_open()

    def freeze(self) -> None:
        """Nothing to freeze."""
        self._need_open()

    def reset(self) -> None:
        """Nothing to reset."""
        self._need_open()

    def stats(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """Nothing to give back."""
        self._closed = True

    def _need_open(self) -> None:
        if self._closed:
            closed()


def open(spec: OpSpec, group: Group) -> PaddleOp:
    """Open the backend for one group, hidden size and dtype."""
    return PaddleOp(spec, group)
