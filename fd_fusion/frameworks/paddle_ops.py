"""Paddle's own ops, for a layer that is not fused: all-reduce, norm and product, and the group of a collective.

On a CPU Paddle has no half-precision add, matmul, rsqrt or mean, and gloo's float16 sum silently returns inf. So
halves are summed and normalised in float32, and rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.base.dygraph.base import in_sot_simulation_mode

from fd_fusion.comm.group import Group
from fd_fusion.frameworks import paddle_runtime
from fd_fusion.frameworks.tensors import dtype_name


def is_eager() -> bool:
    """Return whether ops run as they are called: not inside the tracing of a static graph, by AST or by SOT."""
    return paddle.in_dynamic_mode() and not in_sot_simulation_mode()


def group_of(handle: Any = None) -> Group:
    """Return the `Group` of a Paddle process group: of the default one for None, of one rank where there is none.

    The rank and the size are those within the group, never the global ones.
    """
    if handle is None:
        if not dist.is_initialized():
            return Group("0", 0, 1, (0,), None)
        handle = dist.get_group(0)
    group = _group((*handle.ranks,), handle.rank)
    if group.handle is not handle:
        object.__setattr__(group, "handle", handle)
    return group


@functools.cache
def _group(ranks: tuple[int, ...], rank: int) -> Group:
    """Return one object for each set of ranks, since a `Group` counts the votes that its ranks held."""
    return Group(
        "-".join(map(str, ranks)), rank, len(ranks), ranks, paddle_runtime.tcp_store() if len(ranks) > 1 else None
    )


def _needs_wide(x: paddle.Tensor) -> bool:
    """Return whether Paddle has no arithmetic for this dtype on this device, or a wrong one."""
    return dtype_name(x) in ("bfloat16", "float16") and paddle_runtime.device_of()[0] == "cpu"


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
    """Compute x W + bias; halves on a CPU in float32, rounded once. x [..., K], weight [K, H], bias [H]."""
    if not _needs_wide(x):
        return paddle.nn.functional.linear(x, weight, bias)
    wide = x.astype("float32") @ weight.astype("float32")
    return (wide if bias is None else wide + bias.astype("float32")).astype(x.dtype)
