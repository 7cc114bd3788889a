"""The RMSNorm of q and k by one kernel: chosen, tried and compared with the stock formula at bind, layer by layer.

Nothing is exchanged between ranks here, so nothing is voted on: each rank normalises its own heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import paddle

from fd_fusion import runtime
from fd_fusion.backends.paddle import dtype_name
from fd_fusion.config import FusionConfig
from fd_fusion.integration.outputs import as_numpy, relative_errors
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import UNIT_ROUNDOFF

_ROWS = 3  # rows of the comparison


@dataclass(frozen=True)
class QKNorm:
    """A layer that normalises q and k on packed q|k|v rows [T, width]. `stock` returns them normalised.

    `attach(kernel)` makes the layer call kernel(qkv), in place, and returns the undo.
    """

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    width: int
    eps: float
    weight_offset: float
    weights: Callable[[], tuple[Any, Any]]
    stock: Callable[[Any], Any]
    attach: Callable[[Callable[[Any], Any]], Callable[[], None]]


def settle_qk_norms(norms: Sequence[QKNorm], config: FusionConfig) -> tuple[list[QKNorm], dict[str, Reason]]:
    """Try each layer's kernel. Returns (the layers that get one, why the others stay stock, by name)."""
    rule = _why_stock(config)
    reasons = {norm.name: rule or _try(norm) for norm in norms}
    return [norm for norm in norms if reasons[norm.name] is None], {k: v for k, v in reasons.items() if v is not None}


class Kernel:
    """qkv -> qkv, changed in place. The weights are read at each call, since they may be reloaded.

    A copy of its layer has none: it would read the weights of this one.
    """

    def __init__(self, norm: QKNorm):
        from fd_fusion.backends.qk_norm import qk_rms_norm

        heads = {"q_heads": norm.q_heads, "kv_heads": norm.kv_heads, "head_dim": norm.head_dim}
        self._weights = norm.weights
        self._run = functools.partial(qk_rms_norm, **heads, eps=norm.eps, weight_offset=norm.weight_offset)

    def __call__(self, qkv: Any) -> Any:
        return self._run(qkv, *self._weights())

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def _why_stock(config: FusionConfig) -> Reason | None:
    """The rule that leaves the layers stock, or None. It is never an error."""
    if not config.enable_qk_rms_norm:
        return because("disabled", flag="enable_qk_rms_norm")
    if config.backend == "triton" or (config.backend == "auto" and runtime.device_of()[0] == "gpu"):
        return None
    return because("qk_stock", backend=config.backend, device=runtime.device_of()[0])


def _try(norm: QKNorm) -> Reason | None:
    """Compile, run on random rows, compare with the stock formula."""
    dtype = dtype_name(norm.weights()[0])
    rows = paddle.rand([_ROWS, norm.width], dtype="float32").astype(dtype)
    try:
        want = as_numpy(norm.stock(rows.clone()))
        got = as_numpy(Kernel(norm)(rows))
    except Exception as error:  # a broken package or a failed compile: the reason is reported
        return because("backend_failed", backend="triton", error=f"{type(error).__name__}: {error}")
    error = float(relative_errors(got, want).max())
    allowed = 8 * UNIT_ROUNDOFF[dtype]
    if not error <= allowed:
        facts = {"error": f"{error:.2e}", "budget": f"{allowed:.2e}"}
        return because("qk_differs", site=norm.name, **facts)
    return None
